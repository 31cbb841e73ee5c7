"`fixmatch_check`: exit codes, files that are listed, and a folder with every fault at once"

import os
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from cli_runs import *  # noqa: F403  fixtures
from cli_runs import DATA, KNOWN, SMALL, exit_code, options
from PIL import Image, ImageDraw

from fixmatch_fastai.cli.check import check_command
from fixmatch_fastai.cli.folders import find_images
from fixmatch_fastai.cli.train import fixmatch_train


def check(*args, data=DATA):
    args = *args, '--no-speed', '--duplicates', os.devnull
    return exit_code(check_command, *data, *SMALL[:-2], *args)


def test_check_says_whether_there_are_problems(there, tmp_path, capsys):
    before = sorted(there.rglob('*'))
    assert check() == 0
    assert 'labels' in (out := capsys.readouterr().out) and '0 problems' in out
    assert re.search(r"\n  .*damaged.png can't be opened \(|\n  .*damaged.png: ", out)
    Image.open(find_images(options()).valid['2'][0]).save(tmp_path / 'saved.bmp')
    assert check(data=[*DATA, tmp_path]) == 1
    assert 'In validation too:\n' in (out := capsys.readouterr().out) and 'saved.bmp' in out and '1 problem' in out
    assert sorted(there.rglob('*')) == before


def test_copies_of_validation_images_leave_the_pool(there, tmp_path, capsys):
    shutil.copy(find_images(options()).valid['2'][0], tmp_path / 'copied.png')
    assert check(data=[*DATA, tmp_path]) == 0
    assert '1 images of --unlabeled are copies of validation images, such as ' in (err := capsys.readouterr().err)
    assert 'copied.png: they are left out' in err


def test_check_answers_wrong_names(there, capsys):
    for option in ('policy', 'recipe', 'arch', 'forward'):
        assert check(f'--{option}', 'none') == 2
        assert capsys.readouterr().err.startswith(f'fixmatch_check: --{option} none is not known')


def test_check_looks_at_weights_on_disk(there, weights, capsys):
    assert exit_code(check_command, *DATA, *KNOWN[:-2], '--weights', weights, '--no-speed') == 0
    assert '0 problems' in capsys.readouterr().out


def test_either_spelling_of_labelled(there):
    assert check(data=['--labelled', 'labeled', '--unlabelled', 'unlabeled']) == 0
    assert check(data=['--labelled=labeled', '--unlabelled', 'unlabeled']) == 0


# --- every fault at once


def photo(seed, file=None):
    "Something like a photo: soft, colourful, no two neighbours alike"
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
    noisy = np.asarray(soft) * 0.8 + rng.random((96, 96, 3)) * 40
    img = Image.fromarray(noisy.astype(np.uint8))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        img.save(file)
    return img


def screenshot(seed, file):
    img = Image.new('RGB', (160, 96), 'white')
    ImageDraw.Draw(img).text((5, 5 + seed), f'Dear all, number {seed}', fill=(0, 0, 90))
    img.save(file)


@pytest.fixture
def every_fault(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labeled, valid, pool = (tmp_path / o for o in ('labeled', 'valid', 'pool'))
    for k, c in enumerate(('cat', 'dog')):
        for i in range(8):
            photo(100 * k + i, labeled / c / f'{c}{i}.png')
        for i in range(8, 12):
            photo(100 * k + i, valid / c / f'{c}{i}.png')
    shutil.copy(labeled / 'cat' / 'cat0.png', valid / 'cat' / 'renamed.png')
    photo(1).save(valid / 'cat' / 'recompressed.jpg', quality=60)
    shutil.copy(labeled / 'cat' / 'cat2.png', labeled / 'dog' / 'also_a_cat.png')
    shutil.copy(labeled / 'dog' / 'dog3.png', labeled / 'dog' / 'dog3 (1).png')
    photo(300, labeled / 'Dog' / 'other.png')
    (labeled / 'fish').mkdir()
    photo(301, labeled / '__MACOSX' / 'cat' / 'cat1.png')
    photo(302, labeled / 'beside.png')
    photo(303, labeled / 'cat' / 'more' / 'below.png')
    (labeled / 'cat' / 'cut.png').write_bytes((labeled / 'cat' / 'cat1.png').read_bytes()[:99])
    (labeled / 'dog' / 'empty.jpg').touch()
    (labeled / 'Dog' / '00_first.png').write_bytes(b'no image')
    pool.mkdir()
    for i in range(20):
        screenshot(i, pool / f'screen{i}.png')
        shutil.copy(pool / f'screen{i}.png', pool / f'twice{i}.png')
    shutil.copy(valid / 'dog' / 'dog9.png', pool / 'leak.png')
    if sys.platform == 'linux':
        os.rename(labeled / 'cat' / 'cat4.png', os.fsencode(labeled / 'cat') + b'/caf\xe9.png')
    return '--labeled labeled --valid valid --unlabeled pool'.split()


def test_every_fault_is_found_by_name(every_fault, capsys):
    pytest.importorskip('imagehash')
    assert exit_code(check_command, *every_fault, *SMALL[:-2], '--no-speed') == 1
    out, err = capsys.readouterr()
    table, _, lines = out.partition('\n\n')
    assert [o.split() for o in table.splitlines()] == [
        ['class', 'labelled', 'validation'],
        *(['Dog', '2', '0'], ['cat', '9', '6'], ['dog', '11', '4']),
    ]
    level = {o[9:].split('  ')[0]: o.split()[0] for o in lines.splitlines() if re.match('ok|note|problem', o)}
    for problem in ('class names', 'labelled files', 'copies', 'two classes'):
        assert level[problem] == 'problem', problem
    for note in ('validation', 'both sides', 'empty folders', 'system folders', 'images beside', 'images below'):
        assert level[note] == 'note', note
    for note in ('labelled twice', 'pool twice', 'kinds'):
        assert level[note] == 'note', note
    named = "'Dog' and 'dog'|fish|__MACOSX|beside.png|more/below.png|also_a_cat.png is cat/cat2.png|1, and 1 nearly"
    named += '|20, and [0-9]+ nearly|flatter|labeled/cat/cut.png|labeled/dog/empty.jpg|dog3 .1..png|no validation'
    one_line = ' '.join(lines.split())
    for o in named.split('|'):
        assert re.search(o, one_line), o
    assert 'such as pool/leak.png: they are left out of the pool' in err
    assert '`' not in out, 'the words of Python'
    found = pd.read_csv('duplicates.csv')
    assert len(found) >= 24 and {'same', 'near'} == set(found.how)
    pair = found[(found['set'] == 'validation') & (found.how == 'near')].iloc[0]
    assert pair['image'].endswith('recompressed.jpg') and pair['copy_of'].endswith('labeled/cat/cat1.png')


def test_training_names_all_damaged_labels_at_once_and_stops_at_problems(every_fault, capsys):
    args = *every_fault, *SMALL, '--epochs', 1, '--out', 'out'
    assert exit_code(fixmatch_train, *args) == 2
    err = capsys.readouterr().err
    assert "3 labelled images can't be opened" in err and 'cat/cut.png (' in err and 'dog/empty.jpg (' in err
    assert not os.path.exists('out')
    os.remove('labeled/cat/cut.png')
    os.remove('labeled/dog/empty.jpg')
    os.remove('labeled/Dog/00_first.png')
    assert exit_code(fixmatch_train, *args) == 2
    err = capsys.readouterr().err
    assert 'the preflight found' in err and 'note: empty folders: fish. ' in err and '`' not in err


def test_a_class_of_damaged_images_alone(every_fault, capsys):
    (other,) = (o for o in os.listdir('labeled/Dog') if o != '00_first.png')
    os.remove(f'labeled/Dog/{other}')
    with open('valid/dog/torn.png', 'wb') as f:
        f.write(b'no image')
    assert exit_code(check_command, *every_fault, *SMALL[:-2], '--no-speed') == 2
    err = capsys.readouterr().err
    for name in ('Dog/00_first.png', 'cat/cut.png', 'dog/empty.jpg', 'dog/torn.png'):
        assert name in err
