"Files and classes with any name: commands finish, pages and pictures show them, tables lead back to the files"

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cli_runs import DATA, Page, exit_code, train, working_in
from conftest import quiet_fit, tiny_net
from fastai.vision.all import Learner, PILImageBW, get_image_files, load_learner, parent_label

from fixmatch_fastai.all import (
    FixMatch,
    FreeMatch,
    PseudoLabelInterpretation,
    SaveFixMatch,
    plot_to_label,
    pseudo_label,
    read_pseudo_labels,
    with_pseudo_labels,
)
from fixmatch_fastai.cli.predict import fixmatch_predict
from fixmatch_fastai.core import escape_name, read_csv
from fixmatch_fastai.labeled import labeled_dls
from fixmatch_fastai.self_training import TableLabels, balance_classes

CLASSES = [b'caf\xe9', b'a,b "q" <i>&amp;$_^$', b'new\nline ']
FILES = [b'caf\xe9', b'\xff\xfe', b'a\nb', b'cr\rx', b'a,b', b'q"u\'o', b'<b>&amp;', b'$_^$', b'trail ', b'back\\udce9']
FILES += ['\U0001f600 猫'.encode(), b'y' * 240]


@pytest.fixture(scope='module')
def odd(digits, tmp_path_factory):
    "Labelled and unlabelled digits of three classes, in a folder whose name is no text either"
    root = os.fsencode(tmp_path_factory.mktemp('names')) + b'/jos\xe9/'
    of_class = {c: [o for o in digits if parent_label(o) == str(i)] for i, c in enumerate(CLASSES)}
    try:
        for c in CLASSES:
            os.makedirs(root + b'labeled/' + c)
        os.makedirs(root + b'unlabeled')
        for i, name in enumerate(FILES):
            for k, (c, files) in enumerate(of_class.items()):
                shutil.copy(files[i], root + b'labeled/' + c + b'/' + name + b'.png')
                shutil.copy(files[i + len(FILES)], root + b'unlabeled/%d' % k + name + b'.png')
    except OSError as e:
        pytest.skip(f'the file system refuses such names ({e.strerror})')
    (Path(os.fsdecode(root)) / 'unlabeled' / os.fsdecode(b'dam\xe9.png')).write_bytes(b'no image')
    return Path(os.fsdecode(root))


def images_of(folder):
    return {o for o in get_image_files(folder) if not o.name.startswith('dam')}


@pytest.mark.slow
def test_commands_finish_and_tables_lead_to_the_files(odd, capsys):
    pool, names = images_of(odd / 'unlabeled'), [os.fsdecode(o) for o in CLASSES]
    data = [odd / o if o in ('labeled', 'unlabeled') else o for o in DATA]
    with working_in(odd):
        assert train('--epochs', 1, '--out', odd / 'run', data=data) == 0
        assert 'jos\\udce9/run: acceptance.png' in capsys.readouterr().out
        assert exit_code(fixmatch_predict, '--learner', 'run/learner.pkl', odd / 'unlabeled', '--workers', 0) == 0
        assert train('--epochs', 1, '--out', odd / 'run', '--resume', data=data) == 0
        assert 'nothing is left to train' in capsys.readouterr().out
    assert sorted(load_learner(odd / 'run/learner.pkl').dls.vocab) == sorted(names)
    page = Page(odd / 'run/report.html').text
    assert all(escape_name(o) in page for o in names)
    for file, column in (('run/pseudo_labels.csv', 'item'), ('run/to_label.csv', 'item'), ('predictions.csv', 'file')):
        plain, df = pd.read_csv(odd / file), read_csv(odd / file)
        df = df[df.predicted.notna()]
        assert set(map(Path, df[column])) == pool if 'to_label' not in file else set(map(Path, df[column])) <= pool
        assert len(plain) - len(df) == (file == 'predictions.csv') and set(df.predicted) <= set(names)


@pytest.fixture
def learner(odd):
    files = get_image_files(odd / 'labeled').sorted()
    dls = labeled_dls(files[1:], files[:1], None, PILImageBW.create, ([0.3], [0.33]), n_batches=3, bs=8)
    return Learner(dls, tiny_net(3), path=odd)


@pytest.mark.parametrize('soft', [False, True])
def test_training_on_a_table_opens_the_files(odd, learner, soft):
    pool = sorted(images_of(odd / 'unlabeled'))
    df = pseudo_label(learner, pool, soft=soft, out=odd / 'table.csv')
    read = read_pseudo_labels(odd / 'table.csv')
    pd.testing.assert_frame_equal(read, df)
    assert read.file.tolist() == [str(o) for o in pool] and len(balance_classes(read, 4)) % 4 == 0
    both = pd.concat([read, read])
    mixed = with_pseudo_labels(learner.dls, both)
    assert len(mixed.train_ds) == len(learner.dls.train_ds) + 2 * len(pool)
    label = TableLabels(read)(pool[5])
    vocab = list(learner.dls.vocab)
    assert list(label) == vocab if soft else label in vocab
    quiet_fit(Learner(mixed, learner.model, path=odd), 1)


@pytest.mark.slow
def test_pictures_and_checkpoints_of_any_class(odd, learner):
    vocab, pool = learner.dls.vocab, sorted(images_of(odd / 'unlabeled'))
    loader = learner.dls.unlabeled_dl(pool, mu=2, label_func=lambda o: vocab[int(o.name[0])])
    learner.add_cb(FixMatch(loader, policy=FreeMatch()))
    quiet_fit(learner, 2, cbs=SaveFixMatch('odd'))
    before = learner.model.state_dict()
    quiet_fit(learner, 2, cbs=SaveFixMatch('odd', resume=True))
    assert all((v == before[k]).all() for k, v in learner.model.state_dict().items())
    interp = PseudoLabelInterpretation.from_learner(learner)
    assert interp.acceptance().index.tolist() == list(vocab) and {o for o, _, _ in interp.most_confused(counted=False)}
    figures = [learner.fix_match.plot()[0].figure, learner.fix_match.show_pseudo_labels(), interp.plot_images()]
    figures += [interp.plot_acceptance().figure, interp.plot_confusion_matrix(counted=False).figure]
    figures += [interp.plot_top_losses(counted=False), plot_to_label(interp.suggest_labels(4))]
    for fig in figures:
        fig.canvas.draw()
    titles = {o.get_title().rsplit('  ', 1)[0] for o in figures[2].axes}
    assert titles <= {escape_name(o) for o in vocab} | {''}


def test_weights_in_such_a_folder(odd, learner):
    file = learner.save_weights(odd / os.fsdecode(b'w\xe9'))
    weight = learner.model[0][0].weight.detach().clone()
    learner.model[0][0].weight.data.zero_()
    learner.load_weights(file)
    np.testing.assert_array_equal(learner.model[0][0].weight.detach(), weight)
