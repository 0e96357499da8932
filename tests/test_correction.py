"""The correction as a module: its equation, its place on a model, its file."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_catquant import CatConfig, load_correction, save_correction
from hf_catquant.correction import ClusterAffine, attach, corrections, detach
from hf_catquant.correction_file import empty_correction, entry_of
from toys import Returns


def random_correction(width: int, clusters: int, rank: int | None, seed: int = 0) -> ClusterAffine:
    g = torch.Generator().manual_seed(seed)
    basis = None if rank is None else torch.randn(width, rank, generator=g)
    shape = (clusters, width)
    centroids = torch.randn(clusters, rank or width, generator=g)
    return ClusterAffine.of(basis, centroids, torch.rand(shape, generator=g), torch.randn(shape, generator=g))


def naive(correction: ClusterAffine, y: torch.Tensor) -> torch.Tensor:
    rows = []
    for row in y.reshape(-1, y.shape[-1]).double():
        z = row if correction.basis is None else row @ correction.basis.double()
        c = int((correction.centroids.double() - z).square().sum(1).argmin())
        rows.append(correction.gamma[c].double() * row + correction.beta[c].double())
    return torch.stack(rows).view(y.shape)


@pytest.mark.parametrize(("width", "clusters", "rank"), [(7, 3, 2), (5, 4, None), (12, 1, 1)])
def test_forward_is_the_equation(width, clusters, rank, generator):
    correction = random_correction(width, clusters, rank)
    y = torch.randn(2, 9, width, generator=generator)
    torch.testing.assert_close(correction(y).double(), naive(correction, y), rtol=1e-4, atol=1e-4)
    for dtype in (torch.float16, torch.bfloat16):
        assert correction(y.to(dtype)).dtype == dtype


def test_features_may_be_the_second_dimension(generator):
    correction = random_correction(6, 3, None)
    image = torch.randn(2, 6, 3, 4, generator=generator)
    expected = correction(image.movedim(1, -1)).movedim(-1, 1)
    correction.dim = 1
    assert torch.equal(correction(image), expected)
    rows = naive(correction, image.movedim(1, -1).reshape(-1, 6))
    torch.testing.assert_close(correction(image).double(), rows.view(2, 3, 4, 6).movedim(-1, 1), rtol=1e-4, atol=1e-4)
    low = correction(image.to(torch.bfloat16, memory_format=torch.channels_last))
    assert low.dtype == torch.bfloat16
    assert low.shape == image.shape


def test_tensors_stay_float32():
    model = linear_model()
    attach(model, "2", random_correction(4, 3, 2))
    expected = dict(random_correction(4, 3, 2).named_buffers())
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to("cpu", torch.float16)):
        moved = cast(copy.deepcopy(model))
        assert moved[2].weight.dtype != torch.float32  # the model itself is cast
        for name, value in moved[2].correction.named_buffers():
            assert value.dtype == torch.float32
            assert torch.equal(value, expected[name])  # to half and back would have rounded


def test_one_cluster_folds_into_a_linear(generator):
    linear, correction = nn.Linear(5, 4), random_correction(4, 1, None)
    x = torch.randn(3, 5, generator=generator)
    weight, bias = correction.fold_into(linear.weight, linear.bias)
    torch.testing.assert_close(nn.functional.linear(x, weight, bias), correction(linear(x)), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="only a correction of one cluster folds into a linear, this one has 2"):
        random_correction(4, 2, None).fold_into(linear.weight, None)


@pytest.mark.parametrize(
    ("wrap", "first"),
    [
        (lambda x: x, lambda o: o),
        (lambda x: (x, 1), lambda o: o[0]),
        (lambda x: [x, None], lambda o: o[0]),
        (lambda x: {"last_hidden_state": x, "more": 2}, lambda o: o["last_hidden_state"]),
    ],
)
def test_the_first_tensor_that_comes_out_is_corrected(wrap, first, generator):
    model = nn.ModuleDict({"site": Returns(wrap)})
    correction = random_correction(4, 2, None)
    attach(model, "site", correction)
    x = torch.randn(3, 4, generator=generator)
    assert torch.equal(first(model["site"](x)), correction(x))


def linear_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))


def test_attach_replaces_detaches_copies_and_pickles(generator):
    model, x = linear_model(), torch.randn(3, 5, generator=generator)
    plain = model(x)
    attach(model, "2", random_correction(4, 2, None, seed=1))
    attach(model, "2", random_correction(4, 2, None, seed=2))
    corrected = model(x)
    torch.testing.assert_close(corrected, random_correction(4, 2, None, seed=2)(plain))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), corrected)
        detach(twin, "2")
        assert torch.equal(twin(x), plain)
    assert list(corrections(model)) == ["2"]


def test_a_container_would_run_the_correction():
    model = nn.ModuleDict({"head": linear_model()})
    with pytest.raises(ValueError, match=r"cannot sit on 'head', a Sequential: name its last child, 'head\.2'"):
        attach(model, "head", random_correction(4, 1, None))


def test_compile_and_export_see_through_the_hook(generator):
    model, x = linear_model(), torch.randn(3, 5, generator=generator)
    attach(model, "2", random_correction(4, 3, 2))
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,), strict=False).module()(x), expected)


def test_file_round_trip(tmp_path, generator):
    model, x = linear_model(), torch.randn(3, 5, generator=generator)
    for name, width in (("0", 8), ("2", 4)):
        attach(model, name, random_correction(width, 3, 2))
    first, second = (save_correction(model, tmp_path / part) for part in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    twin = copy.deepcopy(model)
    for name in ("0", "2"):
        detach(twin, name)
    load_correction(twin, tmp_path / "a")
    assert torch.equal(twin(x), model(x))
    for name, correction in corrections(model).items():
        loaded = dict(corrections(twin)[name].named_buffers())
        assert all(torch.equal(loaded[key], value) for key, value in correction.named_buffers())
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["correction.safetensors"]


def test_a_broken_file_attaches_nothing(tmp_path):
    model = linear_model()
    with pytest.raises(ValueError, match="has no correction to save"):
        save_correction(model, tmp_path)
    with pytest.raises(FileNotFoundError):
        load_correction(model, tmp_path)
    attach(model, "2", random_correction(4, 2, None))
    path = save_correction(model, tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[:-8], whole[:20], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a whole correction file"):
            load_correction(linear_model(), path)
    path.write_bytes(whole.replace(b'version\\": \\"1', b'version\\": \\"9'))
    with pytest.raises(ValueError, match="version must be 1, got '9'"):
        load_correction(linear_model(), path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="it corrects '2', which Linear does not have"):
        load_correction(nn.Linear(2, 2), path)
    model[2].correction.beta.fill_(float("nan"))
    save_correction(model, path)
    fresh = linear_model()
    with pytest.raises(ValueError, match=r"2\.correction\.beta has values that are not finite"):
        load_correction(fresh, path)
    assert not corrections(fresh)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_clusters": 0}, "num_clusters must be"),
        ({"num_clusters": "many"}, "num_clusters must be"),
        ({"projection": -1}, "projection must be"),
        ({"alpha": 0}, "alpha must be"),
        ({"alpha": 1.5}, "alpha must be"),
        ({"gamma": "mean"}, "gamma must be"),
        ({"shrinkage": -1}, "shrinkage must be"),
        ({"at": ()}, "at must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": False}, "seed must be"),
    ],
)
def test_config_rules(fields, message):
    with pytest.raises(ValueError, match=message):
        CatConfig(**fields)


def test_config_goes_to_json_and_back():
    for config in (CatConfig(), CatConfig.paper(), CatConfig(at=["a", "blocks"], num_clusters=3)):
        assert CatConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="CatConfig has no field colour"):
        CatConfig.from_dict({"colour": 1})
    paper = CatConfig.paper()
    published = SimpleNamespace(num_clusters=64, projection=50, alpha=0.4, gamma="ls", shrinkage=0.0, seed=42)
    assert vars(published).items() <= paper.to_dict().items()


def test_stored_entry():
    correction = random_correction(6, 3, 2)
    made = empty_correction(entry_of(correction))
    assert [t.shape for t in made.buffers()] == [t.shape for t in correction.buffers()]
    with pytest.raises(ValueError, match="must have width, clusters, rank and dim"):
        empty_correction({"width": 3})
    with pytest.raises(ValueError, match="positive sizes"):
        empty_correction({"width": 3, "clusters": -1, "rank": None, "dim": -1})
