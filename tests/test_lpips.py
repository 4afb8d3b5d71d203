"""LPIPS: the formula against plain numpy and torch, and weights from local files in every form and of no use."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dalle_ds.config import InputError
from dalle_ds.evaluation.lpips import Lpips, load_lpips

SHAPES = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}


@pytest.fixture(scope="module")
def weights():
    """Tensors as published, with random values, the heads positive as theirs are."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, (index, (n_out, n_in, kernel)) in enumerate(SHAPES.items()):
        scale = (2 / (n_in * kernel**2)) ** 0.5
        tensors[f"features.{index}.weight"] = scale * torch.randn(n_out, n_in, kernel, kernel, generator=generator)
        tensors[f"features.{index}.bias"] = 0.1 * torch.randn(n_out, generator=generator)
        tensors[f"lin{i}.model.1.weight"] = torch.rand(1, n_out, 1, 1, generator=generator)
    return tensors


@pytest.fixture(scope="module")
def files(weights, tmp_path_factory):
    """AlexNet and heads apart as .pth, with a classifier that is not wanted, and both as one .safetensors."""
    folder = tmp_path_factory.mktemp("lpips")
    trunk = {name: tensor for name, tensor in weights.items() if name.startswith("features")}
    torch.save({**trunk, "classifier.6.bias": torch.zeros(1000)}, folder / "alexnet.pth")
    torch.save({name: weights[name] for name in weights.keys() - trunk.keys()}, folder / "heads.pth")
    save_file(weights, folder / "both.safetensors")
    return folder


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (2, 3, 40, 40), generator=generator, dtype=torch.uint8) for _ in range(2)]


def direct_distance(weights, first, second):
    """Of two uint8 pictures [3, S, S], stage by stage, position by position."""
    total, stages = 0.0, [[], []]
    for image, list_ in zip((first, second), stages, strict=True):
        x = image.double() / 255 * 2 - 1
        x -= torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
        x /= torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]
        for index, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            if index in (3, 6):
                x = F.max_pool2d(x, kernel_size=3, stride=2)
            w, b = (weights[f"features.{index}.{part}"].double() for part in ("weight", "bias"))
            x = F.conv2d(x[None], w, b, stride=stride, padding=padding)[0].clamp(min=0)
            list_.append(x.numpy())
    for i, (a, b) in enumerate(zip(*stages, strict=True)):
        a, b = (stage / np.sqrt((stage**2).sum(0, keepdims=True) + 1e-30) for stage in (a, b))  # noqa: PLW2901
        head = weights[f"lin{i}.model.1.weight"].double().numpy()[0]
        total += float((head * (a - b) ** 2).sum(0).mean())
    return total


@pytest.mark.parametrize("names", [("alexnet.pth", "heads.pth"), ("heads.pth", "alexnet.pth"), ("both.safetensors",)])
def test_the_distance_is_that_of_the_formula_whatever_files_the_weights_come_from(files, weights, pictures, names):
    distance = load_lpips([files / name for name in names])
    values = distance(*pictures)
    expected = [direct_distance(weights, *pair) for pair in zip(*pictures, strict=True)]
    assert min(expected) > 0.01
    assert values.tolist() == pytest.approx(expected, rel=1e-4)  # float32 convolutions over some thousand products


def test_equal_pictures_are_at_distance_zero_and_the_order_does_not_matter(files, pictures):
    distance = load_lpips([files / "both.safetensors"])
    assert distance(pictures[0], pictures[0]).tolist() == [0, 0]
    assert distance(*pictures).equal(distance(*pictures[::-1]))


def test_the_smallest_picture_still_has_all_five_stages(files):
    distance = load_lpips([files / "both.safetensors"])
    assert distance(*torch.randint(0, 256, (2, 1, 3, 31, 31), dtype=torch.uint8)).isfinite().all()


def test_the_heads_as_published_have_our_names_and_shapes():
    """torchmetrics installs them; they were saved on a GPU, in the old format."""
    torchmetrics = pytest.importorskip("torchmetrics")
    path = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
    if not path.exists():
        pytest.skip(f"{path} is not there in this version")
    with pytest.raises(InputError) as error:
        load_lpips([path])
    assert "lin0.model.1.weight, " not in str(error.value)
    wanted = {name: tensor.shape for name, tensor in Lpips().state_dict().items() if name.startswith("lin")}
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    assert {name: tensor.shape for name, tensor in tensors.items()} == wanted


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_wrong_file_is_refused_in_one_line_that_names_what_is_missing(files, weights, tmp_path):
    (tmp_path / "words.pth").write_text("no tensors")
    (tmp_path / "words.safetensors").write_text("no tensors")
    (tmp_path / "trap.pth").write_bytes(pickle.dumps({"features.0.weight": Trap(tmp_path / "sprung")}, protocol=2))
    torch.save([1, 2], tmp_path / "list.pth")
    save_file({**weights, "lin1.model.1.weight": torch.zeros(1, 128, 1, 1)}, tmp_path / "vgg.safetensors")
    save_file({k: v for k, v in weights.items() if k != "features.6.bias"}, tmp_path / "less.safetensors")
    cases = {
        files / "alexnet.pth": "no tensor lin0.model.1.weight, lin1.model.1.weight, lin2.model.1.weight",
        files / "heads.pth": "no tensor features.0.weight, features.0.bias",
        tmp_path / "less.safetensors": "no tensor features.6.bias; give",
        tmp_path / "vgg.safetensors": r"lin1.model.1.weight has the shape [1, 128, 1, 1] and not [1, 192, 1, 1]",
        tmp_path / "words.pth": "holds no tensors by name",
        tmp_path / "words.safetensors": "holds no tensors by name",
        tmp_path / "trap.pth": "holds no tensors by name",
        tmp_path / "list.pth": "holds no tensors by name",
        tmp_path / "nowhere.pth": "no such file",
    }
    for path, said in cases.items():
        with pytest.raises(InputError) as error:
            load_lpips([path])
        assert said in str(error.value)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "sprung").exists()
