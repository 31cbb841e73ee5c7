"What tells two sets of images apart"

import numpy as np
import pytest
from PIL import Image

from fixmatch_fastai.kinds import differences, kind_of, kinds


def image(seed=0, size=(48, 32), low=60, high=180, grey=False, blocks=1):
    "Noise around a shade of its own"
    rng = np.random.default_rng(seed)
    shade = rng.integers(low, high, (1, 1, 1 if grey else 3))
    shape = size[1] // blocks, size[0] // blocks, 1 if grey else 3
    pixels = np.clip(shade + rng.integers(-40, 40, shape), 0, 255).repeat(blocks, 0).repeat(blocks, 1)
    return Image.fromarray(pixels.astype(np.uint8).repeat(3 // pixels.shape[2], 2))


def seen(n=12, start=0, **kwargs):
    return [kind_of(image(seed, **kwargs)) for seed in range(start, start + n)]


@pytest.mark.parametrize(
    'words, kwargs',
    [
        ({'darker'}, dict(low=0, high=40)),
        ({'lighter'}, dict(low=220, high=255)),
        ({'greyer'}, dict(grey=True)),
        ({'flatter (as drawings and screenshots are)'}, dict(blocks=8)),
        ({'wider'}, dict(size=(96, 32))),
        ({'taller'}, dict(size=(32, 48))),
    ],
)
def test_words(words, kwargs):
    a, b = seen(**kwargs), seen(start=100)
    assert words <= set(differences(a, b))
    assert not words & set(differences(b, a)), 'the other way round it is the other word'


def test_of_one_kind():
    assert differences(seen(start=50), seen(30)) == []
    assert differences(seen(), seen()) == []


def test_few_images_tell_nothing():
    dark = seen(6, low=0, high=40)
    assert 'darker' in differences(dark, seen(6, start=100))
    assert differences(dark[:5], seen(start=100)) == differences(seen(start=100), dark[:5]) == differences([], []) == []


@pytest.mark.parametrize('size', [(1, 1), (1, 9), (9, 1), (600, 300)])
def test_any_size(size):
    found = kind_of(Image.new('RGB', size, (255, 0, 0)))
    assert len(found) == len(kinds) and all(np.isfinite(found))
    brightness, contrast, colour, flatness, width = found
    assert (brightness, contrast, colour, width) == (pytest.approx(1 / 3), 0, 1, size[0] / size[1])
    assert flatness == (1 if size[0] > 1 else 0)
