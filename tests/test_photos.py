"The benchmark on photos runs, goes on where it stopped, and writes the table that the docs quote"

from pathlib import Path

import numpy as np
import pandas as pd
import photos
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent


def test_the_committed_table_of_photos_is_made_of_the_committed_runs():
    rows, tried = (pd.read_csv(ROOT / 'benchmarks' / o) for o in ('photos.csv', 'photos_search.csv'))
    assert photos.table(rows, tried) == (ROOT / 'benchmarks/photos.md').read_text(encoding='utf-8')


@pytest.fixture
def drawn(tmp_path):
    "Red and green photos in class folders, some of them test images"
    rng = np.random.default_rng(0)
    for c, hue in (('red', 0), ('green', 1)):
        (tmp_path / 'drawn' / c).mkdir(parents=True)
        for i in range(16):
            a = rng.integers(0, 100, (40, 36, 3), dtype=np.uint8)
            a[..., hue] += 120
            Image.fromarray(a).save(tmp_path / 'drawn' / c / f'{"test" if i < 4 else "train"}_{i}.png')
    return tmp_path / 'drawn'


@pytest.fixture
def weights(tmp_path):
    "Of a tiny network"
    file = tmp_path / 'weights.safetensors'
    save_file(timm.create_model('test_resnet', num_classes=0).state_dict(), file)
    return file


WAYS = ['probe', 'labels, fine_tune', 'labels, probe head', 'plain softmatch', 'snippet', 'recipe']
WAYS += ['recipe, debiasmatch margin']


@pytest.mark.slow
@pytest.mark.parametrize('search', [False, True], ids=['table', 'search'])
def test_photos_by_every_way(tmp_path, drawn, weights, monkeypatch, capsys, search):
    "One way of each kind runs; what is there is not run again; a search sees no test image"
    seen = []
    monkeypatch.setattr(photos, 'TRIALS', [('recipe', dict(steps=6)), ('labels_alone', dict(steps=6, light=True))])
    monkeypatch.setattr(photos.Photos, 'unlabeled_dl', spy(photos.Photos.unlabeled_dl, seen))
    args = ['--only', *WAYS, '--images', drawn, '--network', 'test_resnet', '--weights', weights]
    args += ['--size', 32, '--labels', 2, '--seeds', 1, '--steps', 10, '--processes', 1]
    args += ['--store', tmp_path / 'store', '--out', tmp_path, *['--search'] * search]
    photos.main([*map(str, args)])
    rows = pd.read_csv(tmp_path / ('photos_search.csv' if search else 'photos.csv'))
    assert len(rows) == (2 if search else len(WAYS)) and rows.accuracy.between(0, 1).all()
    assert set(rows.n_test) == ({4} if search else {8}) and set(rows['pool']) == ({20} if search else {24})
    assert seen and not any(o.name.startswith('test_') for o in seen)
    if not search:
        assert photos.table(rows) == (tmp_path / 'photos.md').read_text(encoding='utf-8')
        assert (tmp_path / 'photos.png').exists()
    monkeypatch.setattr(photos, 'run', lambda *args: pytest.fail('what has been measured is not measured again'))
    photos.main([*map(str, args)])
    assert f'0 runs to do, {len(rows)} done before' in capsys.readouterr().out


def spy(unlabeled_dl, seen):
    def spied(self, *args, **kwargs):
        dl = unlabeled_dl(self, *args, **kwargs)
        seen.extend([*dl.dataset.items, *self.labeled])
        return dl

    return spied


def test_cells_of_the_table_of_photos():
    "By hand: the recipe is 15 points above the better of the ways with labels alone"
    accuracy = {'labels, fine_tune': (0.4, 0.6), 'labels, probe head': (0.5, 0.6), 'recipe': (0.6, 0.8)}
    runs = [dict(arm=arm, seed=seed, accuracy=o) for arm, both in accuracy.items() for seed, o in enumerate(both)]
    rows = pd.DataFrame(runs).assign(labels=4)
    assert photos.cell(rows, 'recipe') == '70.0 ± 14.1 (+15.0)'
    assert photos.cell(rows, 'labels, probe head') == '55.0 ± 7.1'
    assert photos.cell(rows, 'probe') == '–'
