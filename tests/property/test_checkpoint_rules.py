"""Key rules are reversible for every depth and shape, whatever the order of the names."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sat.checkpoint.format import InMemory
from sat.checkpoint.rules import as_ours, as_theirs
from sat.first_stage import keys as vae_keys
from sat.keys import Computed
from sat.models.cogview3_plus import keys as plus_keys
from sat.models.cogview3_unet import keys as unet_keys
from sat.models.t5 import keys as t5_keys

LISTS = {
    "plus sat": plus_keys.SAT,
    "plus diffusers": plus_keys.DIFFUSERS,
    "unet sat": unet_keys.SAT,
    "vae sat": vae_keys.SAT,
    "vae diffusers": vae_keys.DIFFUSERS,
    "t5": t5_keys.HF,
}


@st.composite
def ours(draw):
    """A rule list and tensors under our names: any depth, one to four rows a third, shuffled."""
    rules = LISTS[draw(st.sampled_from(sorted(LISTS)))]
    depth, rows = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    names = set()
    for rule in rules:
        pattern = getattr(rule, "ours", None)
        if pattern is None or isinstance(rule, Computed):
            continue
        patterns = [pattern] if isinstance(pattern, str) else pattern
        for suffix in ("weight", "bias"):
            for i in range(depth):
                for one in patterns:
                    names.add(one.replace("**", "*").replace("*", suffix).replace("{}", str(i)))
    order = draw(st.permutations(sorted(names)))
    return rules, {
        name: torch.arange(6.0 * rows * 2).reshape(6 * rows, 2) + hash(name) % 97 for name in order
    }


@given(ours())
def test_ours_to_theirs_and_back_is_exact(case):
    rules, tensors = case
    theirs = as_theirs(InMemory(tensors), rules)
    back = as_ours(theirs, rules)
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert all(theirs[name].shape == theirs.info(name).shape for name in theirs)
    assert len(theirs) >= len(tensors)
