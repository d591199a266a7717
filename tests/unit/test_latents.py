"""Initial latents: files and shapes."""

import pytest
import torch
from safetensors.torch import save_file

from sat.sampling.inputs import LatentsError, checked_latents, read_latents

NOISE = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("content", [NOISE, {"latents": NOISE, "other": NOISE * 2}, {"x": NOISE}])
def test_latents_are_read_from_both_kinds_of_file(tmp_path, content) -> None:
    torch.save(content, tmp_path / "a.pt")
    assert torch.equal(read_latents(tmp_path / "a.pt"), NOISE)
    save_file(content if isinstance(content, dict) else {"latents": content}, tmp_path / "a.safetensors")
    assert torch.equal(read_latents(tmp_path / "a.safetensors"), NOISE)


class _Evil:
    def __reduce__(self):
        return (print, ("never executed",))


def test_a_file_with_code_is_not_executed(tmp_path, capsys) -> None:
    torch.save(_Evil(), tmp_path / "a.pt")
    with pytest.raises(LatentsError, match="holds more than tensors; save the bare tensor"):
        read_latents(tmp_path / "a.pt")
    assert "never executed" not in capsys.readouterr().out


def test_unreadable_files_are_one_clear_line(tmp_path) -> None:
    with pytest.raises(LatentsError, match=r"gone.pt: no such file"):
        read_latents(tmp_path / "gone.pt")
    with pytest.raises(LatentsError, match=r"a.npy: expected a .safetensors or .pt file"):
        read_latents(tmp_path / "a.npy")
    save_file({"latents": NOISE}, tmp_path / "cut.safetensors")
    data = (tmp_path / "cut.safetensors").read_bytes()
    for name in ("cut.safetensors", "cut.pt"):
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(LatentsError, match=rf"{name}: damaged or not a tensor file") as error:
            read_latents(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_file_of_several_tensors_needs_the_name(tmp_path) -> None:
    save_file({"b": NOISE, "a": NOISE + 1}, tmp_path / "a.safetensors")
    with pytest.raises(LatentsError, match=r"holds \['a', 'b'\]; name the tensor 'latents'"):
        read_latents(tmp_path / "a.safetensors")
    torch.save(["no tensor"], tmp_path / "a.pt")
    with pytest.raises(LatentsError, match="expected a tensor, got list"):
        read_latents(tmp_path / "a.pt")


def test_latents_become_float32_and_keep_their_values() -> None:
    given = checked_latents(NOISE.double(), (4, 6, 10), prompts=1, batch_size=2)
    assert given.dtype == torch.float32
    assert torch.equal(given, NOISE)
    assert checked_latents(NOISE[0], (4, 6, 10), 1, 1).shape == (1, 4, 6, 10)


@pytest.mark.parametrize(("prompts", "batch_size"), [(1, 2), (2, 1), (5, 2)])
def test_latents_may_cover_a_batch_or_the_whole_run(prompts: int, batch_size: int) -> None:
    assert torch.equal(checked_latents(NOISE, (4, 6, 10), prompts, batch_size), NOISE)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (NOISE[:, :3], r"shape \(2, 3, 6, 10\): expected 1 or 3 images of \(C, h, w\) = \(4, 6, 10\)"),
        (NOISE.transpose(2, 3), r"shape \(2, 4, 10, 6\): expected"),
        (NOISE, r"shape \(2, 4, 6, 10\): expected 1 or 3 images"),
        (NOISE[0, 0], r"shape \(6, 10\): expected"),
        (NOISE[:1].long(), "are torch.int64: expected a floating-point tensor"),
        (NOISE[:1] * float("nan"), "hold NaN or infinity"),
    ],
)
def test_latents_that_do_not_fit_are_refused(latents, message: str) -> None:
    with pytest.raises(LatentsError, match=message):
        checked_latents(latents, (4, 6, 10), prompts=3, batch_size=1)
