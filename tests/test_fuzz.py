"Damaged JPEG and PNG bytes in the pool: training never stops for them. Longer: FUZZ_FILES=20000 python -m pytest tests/test_fuzz.py"

import io
import os
import random
import warnings

import numpy as np
import pytest
from conftest import quiet_fit, tiny_net
from fastai.vision.all import ImageDataLoaders, Learner, PILImage, Resize
from PIL import Image

from fixmatch_fastai.all import FixMatch

N = int(os.environ.get('FUZZ_FILES', 150))


def image_bytes(rng, format):
    img = Image.fromarray(rng.integers(0, 256, (rng.integers(8, 40), rng.integers(8, 40), 3), dtype=np.uint8))
    if format == 'PNG' and rng.random() < 0.3:
        img = img.convert(str(rng.choice(['P', 'LA', 'RGBA', '1', 'I;16'] if rng.random() < 0.5 else ['L', 'RGBA'])) if rng.random() < 0.5 else 'L')
    file = io.BytesIO()
    img.save(file, format, **(dict(progressive=True) if format == 'JPEG' and rng.random() < 0.5 else {}))
    return bytearray(file.getvalue())


def damage(data, rng):
    "One to three of: bytes changed, cut off, cut out, doubled, zeroed, put in front"
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        n = len(data)
        if n < 2:
            break
        i, j = sorted(rng.integers(0, n, 2))
        match rng.integers(0, 7):
            case 0:
                for k in rng.integers(0, n, rng.integers(1, 12)):
                    data[k] = rng.integers(0, 256)
            case 1:
                del data[i:]
            case 2:
                del data[i:j]
            case 3:
                data[i:i] = data[i:j]
            case 4:
                data[i:j] = bytes(j - i)
            case 5:
                data[0:0] = rng.bytes(rng.integers(1, 9))
            case 6:
                for k in rng.integers(0, min(n, 40), 3):  # in the header, where sizes and tables are
                    data[k] = rng.integers(0, 256)
    return bytes(data)


@pytest.mark.timeout(max(300, N))
def test_damaged_bytes(tmp_path):
    rng = np.random.default_rng(0)
    good, bad = [], []
    for i in range(12):
        good.append(tmp_path / f'{i % 2}_{i}.png')
        good[-1].write_bytes(image_bytes(rng, 'PNG'))
    for i in range(N):
        format = 'JPEG' if i % 2 else 'PNG'
        bad.append(tmp_path / f'bad{i}.{format.lower()}')
        bad[-1].write_bytes(damage(image_bytes(rng, format), rng))
    dls = ImageDataLoaders.from_name_func(tmp_path, good, lambda o: o[0], valid_pct=0.25, bs=4, item_tfms=Resize(16), num_workers=0, seed=0)
    pool = [*bad, *good]
    loader = dls.unlabeled_dl(pool, mu=4)
    dls = dls.repeat_train(-(-len(pool) // 16))  # a whole pass over the pool
    learn = Learner(dls, tiny_net(2, n_in=3), cbs=FixMatch(loader), path=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of PIL's own
        quiet_fit(learn, 1)
        told = set(learn.fix_match.damaged.item)
        unreadable = set()
        for o in pool:
            try:
                PILImage.create(o)
            except Exception:
                unreadable.add(o)
    assert told == unreadable, 'exactly the files that cannot be opened are told'
    assert N // 4 < len(told) < len(pool) and not told & set(good)
    steps = learn.fix_match._recorder._steps
    assert len(steps) == len(dls.train) and set(steps[:, 6]) == {16}
    print(f'{N} damaged files, {len(told)} of them unreadable, {len(set(o.split(":")[0] for o in learn.fix_match.damaged.error))} kinds of error')


def test_damage_is_damage():
    "The damage above is not a copy"
    rng = np.random.default_rng(1)
    random.seed(0)
    whole = [bytes(image_bytes(np.random.default_rng(i), 'PNG')) for i in range(20)]
    assert sum(damage(bytearray(o), rng) != o for o in whole) >= 19
