"""BigBird with a global stream, the attention of ETC: two softmaxes over two streams, with relative positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import assert_same_values_and_gradients, is_valid, masks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.pegasus_x.modeling_pegasus_x import PegasusXGlobalLocalAttention

from subquad import Mask
from subquad.benchmark.probes import run_probes
from subquad.build import build_mixer, make_dims, mixer_config
from subquad.layers.global_local import GlobalLocalMixer


def streams(**form: Any) -> GlobalLocalMixer:
    options: dict[str, Any] = {"kind": "etc", "num_global": 2, "window": 3, **form}
    mixer = build_mixer("bigbird", embed_dim=options.pop("embed_dim", 4), num_heads=2, **options)
    assert isinstance(mixer, GlobalLocalMixer)
    mixer = mixer.double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return mixer


def layer_of(layers: nn.ModuleDict, *names: str) -> nn.Module:
    """The layer by the first of these names that there is."""
    return layers[next(name for name in names if name in layers)]


def definition(mixer: GlobalLocalMixer, x: Tensor, mask: Mask | None) -> Tensor:
    """One row after the other, one key after the other."""
    options, width = mixer.options, mixer.dims.head_dim
    count, m = min(options.num_global, x.shape[1]), options.max_distance
    scores_of = {"global": mixer.global_scores, "long": mixer.long_scores}

    def stream(i: int) -> str:
        return "global" if i < count else "long"

    def sees(b: int, i: int, j: int) -> bool:
        near = stream(i) == "global" or stream(j) == "global" or abs(i - j) <= options.radius
        return near and is_valid(mask, b, j)

    def project(layers: nn.ModuleDict, token: Tensor, *names: str) -> Tensor:
        return layer_of(layers, *names, "shared")(token).unflatten(-1, (-1, width))

    def relative_id(i: int, j: int) -> int:
        if stream(i) != stream(j):
            return 2 * m + 1
        return min(j - i, m) if j >= i else m + min(i - j, m)

    rows = []
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            own, heads = stream(i), torch.zeros(2, width, dtype=x.dtype)
            q, scores, values = project(mixer.project_query, x[b, i], own), [], []
            for j in (j for j in range(x.shape[1]) if sees(b, i, j)):
                names = (f"{own}_to_{stream(j)}", own)
                score = (q * project(mixer.project_key, x[b, j], *names)).sum(dim=-1)
                if (relative := scores_of[own]) is not None:
                    row = relative_id(i, j)
                    score = score + (q * relative.vectors[:, row]).sum(dim=-1) + relative.biases[:, row]
                scores.append(score / width**0.5)
                values.append(project(mixer.project_value, x[b, j], *names))
            if scores:
                heads = (torch.stack(scores).softmax(dim=0)[..., None] * torch.stack(values)).sum(dim=0)
            y = layer_of(mixer.project_out, own, "shared")(heads.flatten())
            rows.append(y if is_valid(mask, b, i) else 0 * y)
    return torch.stack(rows).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("sharing", ["none", "kv", "qkv"])
@pytest.mark.parametrize("max_distance", [0, 1, 3])
@given(
    length=st.sampled_from([1, 3, 4, 9]),
    num_global=st.sampled_from([1, 3]),
    window=st.sampled_from([1, 3, 5, 31]),
    share_output=st.booleans(),
    data=st.data(),
)
def test_it_equals_the_definition(
    sharing: str, max_distance: int, length: int, data: st.DataObject, **options: Any
) -> None:
    mixer = streams(sharing=sharing, max_distance=max_distance, **options)
    mask = data.draw(masks(2, length, segments=False))
    x = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(mixer, lambda: mixer(x, mask=mask).y, lambda: definition(mixer, x, mask), [x])


@pytest.mark.parametrize("max_distance", [0, 2])
def test_every_probe_passes(max_distance: int) -> None:
    config = mixer_config("bigbird", kind="etc", num_global=3, window=5, max_distance=max_distance)
    results = run_probes(config, make_dims(embed_dim=8, num_heads=2))
    assert [f"{result.name}: {result.detail}" for result in results if not result.passed] == []


@pytest.mark.parametrize("max_distance", [0, 2])
def test_padding_on_the_right_changes_nothing(max_distance: int) -> None:
    mixer, x = streams(max_distance=max_distance), torch.randn(1, 50, 4, dtype=torch.float64)
    padded = mixer(x, mask=Mask.from_lengths([39], 50)).y[:, :39]
    torch.testing.assert_close(padded, mixer(x[:, :39]).y, rtol=1e-10, atol=1e-10)


def test_a_wide_window_with_one_projection_for_all_is_dense_attention() -> None:
    mixer = streams(window=99, max_distance=0, sharing="qkv", share_output=True)
    dense, x = build_mixer("full", embed_dim=4, num_heads=2).double(), torch.randn(2, 20, 4, dtype=torch.float64)
    dense.load_state_dict({name.replace(".shared", ""): value for name, value in mixer.state_dict().items()})
    torch.testing.assert_close(mixer(x).y, dense(x).y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("sharing", "share_output", "layers"),
    [
        ("none", False, (2, 4, 4, 2)),
        ("kv", False, (2, 2, 2, 2)),
        ("qkv", False, (1, 1, 1, 2)),
        ("kv", True, (2, 2, 2, 1)),
    ],
)
def test_sharing_leaves_fewer_projections(sharing: str, share_output: bool, layers: tuple[int, ...]) -> None:
    mixer = streams(sharing=sharing, share_output=share_output)
    parts = (mixer.project_query, mixer.project_key, mixer.project_value, mixer.project_out)
    assert tuple(len(part) for part in parts) == layers


def test_the_two_softmaxes_have_relative_scores_of_their_own() -> None:
    mixer, x = streams(max_distance=2), torch.randn(1, 12, 4, dtype=torch.float64)
    before = mixer(x).y
    assert mixer.global_scores is not None
    with torch.no_grad():
        mixer.global_scores.vectors.add_(torch.randn_like(mixer.global_scores.vectors))
    after = mixer(x).y
    assert torch.equal(after[:, 2:], before[:, 2:])
    assert not torch.isclose(after[:, :2], before[:, :2]).all(dim=-1).any()


def test_fresh_relative_scores_are_those_of_the_paper() -> None:
    mixer = build_mixer("bigbird", embed_dim=64, num_heads=4, kind="etc", num_global=4)
    assert isinstance(mixer, GlobalLocalMixer)
    for scores in (mixer.global_scores, mixer.long_scores):
        assert scores is not None
        assert scores.vectors.shape == (4, 2 * 12 + 2, 16)
        assert float(scores.vectors.detach().abs().max()) <= 1.0
        assert float(scores.vectors.detach().std()) == pytest.approx(0.44, abs=0.02)  # 0.5 before the cut
        assert not scores.biases.any()


def test_rotary_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="kind='etc' has relative positions of its own, got positions='rotary'"):
        streams(positions="rotary")


def test_the_defaults_of_the_kind_are_written_out() -> None:
    written = mixer_config("bigbird", kind="etc", num_global=7).to_dict()
    assert {name: written[name] for name in ("window", "max_distance", "sharing", "share_output")} == {
        "window": 169,
        "max_distance": 12,
        "sharing": "none",
        "share_output": False,
    }


def test_it_gives_the_result_of_the_released_global_local_attention_inside_one_block() -> None:
    """Hugging Face's PEGASUS-X: shared projections, no relative positions; its local part is a whole block."""
    mixer = streams(embed_dim=16, num_global=3, window=41, max_distance=0, sharing="qkv", share_output=True, bias=False)
    peer = PegasusXGlobalLocalAttention(16, 2, block_size=20).double()
    pairs = (
        (peer.q_proj, mixer.project_query),
        (peer.k_proj, mixer.project_key),
        (peer.v_proj, mixer.project_value),
        (peer.out_proj, mixer.project_out),
    )
    for theirs, ours in pairs:
        theirs.load_state_dict(ours["shared"].state_dict())
    x = torch.randn(2, 23, 16, dtype=torch.float64)
    valid = Mask.from_lengths([23, 15], 23).valid
    assert valid is not None
    penalty = torch.where(valid[:, 3:], 0.0, -1e9).double()
    long_y, global_y, _ = peer(x[:, 3:], x[:, :3], penalty)
    ours = mixer(x, mask=Mask(valid)).y
    torch.testing.assert_close(ours[valid], torch.cat((global_y, long_y), dim=1)[valid], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_distance", [0, 2])
def test_an_empty_batch_and_narrow_numbers_are_served(max_distance: int) -> None:
    mixer = streams(max_distance=max_distance).float()
    assert mixer(torch.randn(0, 9, 4)).y.shape == (0, 9, 4)
    x = torch.randn(2, 40, 4)
    exact = mixer(x).y.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x).y
    assert y.dtype == torch.float32
    assert float((y.detach() - exact).norm() / exact.norm()) < 0.03
    y.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in mixer.parameters() if p.grad is not None)
