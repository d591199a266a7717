# shellcheck shell=bash
# What differs from cluster to cluster. Copy it to train_scripts/site.sh, which git ignores: the SLURM scripts source it in the
# job, with `sbatch --export=NONE` too. Source it before sbatch as well for the SBATCH_ lines, which take the place of options:
# `. train_scripts/site.sh`. SAT_SITE names another file. docs/slurm.md explains the scripts.

# Account, partition, memory and the like. GPUs are asked for on the command line.
#export SBATCH_ACCOUNT=my_project SBATCH_PARTITION=gpu SBATCH_MEM_PER_GPU=64G

# Modules and the virtual environment, by its whole path.
#module load python/3.11 cuda/12.4
#source "$HOME/venvs/sat/bin/activate"

# The network between nodes, where the first one found is the wrong one.
#export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# A container that every node starts its ranks in; it needs bash, and torchrun on its PATH. Once, on a machine with a network:
#   apptainer build cogview3.sif docker://pytorch/pytorch:2.7.1-cuda12.6-cudnn9-runtime
#   apptainer exec cogview3.sif python -m venv --system-site-packages "$HOME/venvs/sat"
#   apptainer exec cogview3.sif "$HOME/venvs/sat/bin/pip" install -r requirements.txt
# APPTAINERENV_PREPEND_PATH puts that environment on the container's PATH, --nv gives it the GPUs; --bind adds folders outside of
# the home and the working folder, such as weights and data.
#export APPTAINERENV_PREPEND_PATH=$HOME/venvs/sat/bin
#CONTAINER="apptainer exec --nv --bind /scratch $HOME/cogview3.sif"
