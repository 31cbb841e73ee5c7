"The benchmark on photos runs, goes on where it stopped, and writes the table that the docs quote"

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / 'benchmarks'))
import photos  # noqa: E402


def test_the_committed_table_is_made_of_the_committed_runs():
    rows, tried = (pd.read_csv(ROOT / 'benchmarks' / o) for o in ('photos.csv', 'photos_search.csv'))
    assert photos.table(rows, tried) == (ROOT / 'benchmarks/photos.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('search', [False, True], ids=['table', 'search'])
def test_every_way(tmp_path, monkeypatch, capsys, search):
    "One way of each kind runs on a few drawn photos and a network of its own weights; what is there is not run again; a search sees no test image"
    rng = np.random.default_rng(0)
    for c, hue in (('red', 0), ('green', 1)):
        (tmp_path / 'drawn' / c).mkdir(parents=True)
        for i in range(16):
            a = rng.integers(0, 100, (40, 36, 3), dtype=np.uint8)
            a[..., hue] += 120
            Image.fromarray(a).save(tmp_path / 'drawn' / c / f'{"test" if i < 4 else "train"}_{i}.png')
    save_file(timm.create_model('test_resnet', num_classes=0).state_dict(), tmp_path / 'weights.safetensors')
    seen = []
    monkeypatch.setattr(photos, 'TRIALS', [('recipe', dict(steps=6)), ('labels_alone', dict(steps=6, light=True))])
    monkeypatch.setattr(photos.Photos, 'unlabeled_dl', spy(photos.Photos.unlabeled_dl, seen))
    ways = ['probe', 'labels, fine_tune', 'labels, probe head', 'plain softmatch', 'snippet', 'recipe', 'recipe, debiasmatch margin']
    args = [
        '--only',
        *ways,
        '--images',
        tmp_path / 'drawn',
        '--network',
        'test_resnet',
        '--weights',
        tmp_path / 'weights.safetensors',
        '--size',
        '32',
        '--labels',
        '2',
    ]
    args += ['--seeds', '1', '--steps', '10', '--processes', '1', '--store', tmp_path / 'store', '--out', tmp_path] + ['--search'] * search
    photos.main([*map(str, args)])
    rows = pd.read_csv(tmp_path / ('photos_search.csv' if search else 'photos.csv'))
    assert len(rows) == (2 if search else len(ways)) and rows.accuracy.between(0, 1).all()
    assert set(rows.n_test) == ({4} if search else {8}) and set(rows['pool']) == ({20} if search else {24})
    assert seen and not any(o.name.startswith('test_') for o in seen)
    if not search:
        assert photos.table(rows) == (tmp_path / 'photos.md').read_text(encoding='utf-8') and (tmp_path / 'photos.png').exists()
    monkeypatch.setattr(photos, 'run', lambda *args: pytest.fail('what has been measured is not measured again'))
    photos.main([*map(str, args)])
    assert f'0 runs to do, {len(rows)} done before' in capsys.readouterr().out


def spy(unlabeled_dl, seen):
    def spied(self, *args, **kwargs):
        dl = unlabeled_dl(self, *args, **kwargs)
        seen.extend([*dl.dataset.items, *self.labeled])
        return dl

    return spied


def test_cells_of_the_table():
    "By hand: labels alone 40 and 60 % (fine_tune) and 50 and 60 % (probe head); the recipe 60 and 80 %, 15 points above the better"
    accuracy = {'labels, fine_tune': (0.4, 0.6), 'labels, probe head': (0.5, 0.6), 'recipe': (0.6, 0.8)}
    rows = pd.DataFrame([dict(labels=4, arm=arm, seed=i, accuracy=a) for arm, o in accuracy.items() for i, a in enumerate(o)])
    assert photos.cell(rows, 'recipe') == '70.0 ± 14.1 (+15.0)' and photos.cell(rows, 'labels, probe head') == '55.0 ± 7.1'
    assert photos.cell(rows, 'probe') == '–'
