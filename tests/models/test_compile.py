"""A compiled mechanism is the same function."""

import copy
from collections.abc import Iterator

import pytest
import torch

from subquad.build import list_mixers, make_dims, mixer_config
from subquad.interface import MixerConfig


def results(mixer, x):
    x = x.clone().requires_grad_()
    y = mixer(x).y
    gradients = torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()], allow_unused=True)
    return [y, *(gradient for gradient in gradients if gradient is not None)]


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of earlier code: the compiler has been seen to run a remembered graph on inputs of other shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.mark.compiler
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own deprecations
@pytest.mark.parametrize("name", list_mixers())
def test_compiled_mechanism_has_the_same_values_and_gradients(name):
    config: MixerConfig = mixer_config(name)
    mixer = config.build(make_dims(embed_dim=32, num_heads=4, max_length=80, causal=config.traits.causal))
    x = torch.randn(2, 80, 32)
    if not torch.equal(results(copy.deepcopy(mixer), x)[0], results(copy.deepcopy(mixer), x)[0]):
        mixer.eval()  # it draws in training, and a compiler draws otherwise
    expected = results(copy.deepcopy(mixer), x)
    compiled = torch.compile(mixer)
    for found, right in zip(results(compiled, x), expected, strict=True):
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)
