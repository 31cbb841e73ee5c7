"The commands: what they write and say, and what becomes of mistakes, damage and Ctrl-C"

import importlib
import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from configparser import ConfigParser
from contextlib import redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from fastai.vision.all import Normalize, get_image_files, load_learner, models, parent_label
from safetensors.torch import load_file, save_file

from fixmatch_fastai import cli, experiment, recipe, self_training
from fixmatch_fastai.all import split_labeled
from fixmatch_fastai.recipe import probe

ROOT = Path(__file__).parent.parent
ODD = '<b>zero & "nil" $_^$'  # a class, and a folder, that no page must take for HTML and no picture for a formula
SMALL = '--arch test_resnet --no-pretrained --size 32 --no-flip --workers 0 --steps 3 --bs 4 --mu 2 --lr 0.01'.split()
DATA = '--labeled labeled --unlabeled unlabeled'.split()
KNOWN = [*(o for o in SMALL[:-1] if o != '--no-pretrained'), '0.0003']  # for a pretrained network, which begins with a probe's answers


@pytest.fixture(scope='module')
def folders(digits, tmp_path_factory):
    "8 labelled images of each of three classes, and 24 without labels, one of them damaged"
    root = tmp_path_factory.mktemp('images')
    some = [o for o in digits if parent_label(o) in '012']
    labeled, rest = split_labeled(some, parent_label, 24)
    for o in labeled:
        folder = root / 'labeled' / {'0': ODD}.get(parent_label(o), parent_label(o))
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(o, folder)
    (root / 'unlabeled' / 'deeper').mkdir(parents=True)
    pool, rest = split_labeled(rest, parent_label, 24)
    for i, o in enumerate(pool):
        shutil.copy(o, root / 'unlabeled' / ('deeper' if i % 2 else '.'))
    (root / 'unlabeled' / 'damaged.png').write_bytes(b'no image')
    (root / 'new').mkdir()
    for o in rest[:6]:
        shutil.copy(o, root / 'new')
    (root / 'new' / 'cut_short.png').write_bytes(Path(rest[7]).read_bytes()[:60])
    (root / 'empty').mkdir()
    (root / 'file').touch()
    return root


@pytest.fixture
def there(folders, monkeypatch):
    monkeypatch.chdir(folders)
    return folders


def command(func, *args):
    "Its exit code; also where the arguments can't even be read"
    try:
        return cli.run_command(func, args)
    except SystemExit as e:
        return e.code


def train(*args, data=DATA):
    return command(cli.fixmatch_train, *data, *SMALL, *args)


@pytest.fixture(scope='module')
def run(folders):
    "A run with everything"
    before = os.getcwd()
    os.chdir(folders)
    try:
        assert train('--policy', 'FreeMatch', '--epochs', 2, '--compare', '--out', 'run') == 0
    finally:
        os.chdir(before)
    return folders / 'run'


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "Weights of the small network, with its classifier, as timm gives them"
    file = tmp_path_factory.mktemp('weights') / 'net.safetensors'
    torch.manual_seed(0)
    save_file(timm.create_model('test_resnet').state_dict(), file)
    return file


@pytest.fixture(scope='module')
def tuned(folders, weights):
    "A run of the recipe for pretrained networks with everything, and what it said"
    before, out = os.getcwd(), io.StringIO()
    os.chdir(folders)
    try:
        with redirect_stdout(out):
            assert command(cli.fixmatch_train, *DATA, *KNOWN, '--weights', weights, '--epochs', 3, '--compare', '--out', 'tuned') == 0
    finally:
        os.chdir(before)
    return folders / 'tuned', out.getvalue()


# What a run writes


def test_a_pool_that_is_left_out_is_told_of(weights, there, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recipe.PoolCheck, '_labels', lambda self, model, x: torch.full((len(x),), -1))
    assert command(cli.fixmatch_train, *DATA, *KNOWN, '--weights', weights, '--epochs', 3, '--no-check', '--out', tmp_path) == 0
    assert 'The unlabelled images were left out' in capsys.readouterr().out
    assert 'The unlabelled images were left out' in (tmp_path / 'report.html').read_text(encoding='utf-8')


def test_everything_is_there(run):
    written = 'learner.pkl weights.safetensors history.csv supervised_history.csv training.png pseudo_labels.png acceptance.png confusion.png pseudo_labels.csv to_label.csv report.html'
    assert {o.name for o in run.iterdir() if o.is_file()} == set(written.split())
    assert not list(run.rglob('*.tmp'))


def test_tables_agree_with_the_learner(run, there):
    df = pd.read_csv(run / 'pseudo_labels.csv')
    learn = load_learner(run / 'learner.pkl')
    assert list(learn.dls.vocab) == sorted(['1', '2', ODD])
    with learn.no_bar():
        probs = learn.get_preds(dl=learn.dls.test_dl([Path(o) for o in df['item']]))[0]
    assert len(df) == 24 and not df['item'].str.contains('damaged').any()
    assert df.predicted.tolist() == [learn.dls.vocab[i] for i in probs.argmax(1)]
    np.testing.assert_allclose(df.confidence, probs.max(1).values, atol=1e-5)
    history = pd.read_csv(run / 'history.csv')
    assert history.epoch.tolist() == [0, 1]
    assert {'train_loss', 'valid_loss', 'accuracy', 'loss_x', 'loss_u', 'mask_rate', 'time'} <= set(history)
    assert set(pd.read_csv(run / 'to_label.csv')['item']) <= set(df['item'])


def test_weights_are_those_of_the_learner(run):
    saved, model = load_file(run / 'weights.safetensors'), load_learner(run / 'learner.pkl').model.state_dict()
    assert saved.keys() == model.keys()
    for k, v in saved.items():
        assert torch.equal(v, model[k])


class Page(HTMLParser):
    "Headings, text and links of a page; fails where tags are not closed in their order"

    VOID = {'meta', 'img', 'br', 'link', 'input', 'hr'}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.headings, self.links, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ('src', 'href', 'action', 'data')]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == 'h2':
            self.headings.append(data)
        if self.open and self.open[-1] != 'style':
            self.text.append(data)


def test_the_report_is_one_whole_page(run):
    text = (run / 'report.html').read_text(encoding='utf-8')
    page = Page(text)
    assert page.headings == ['What it was trained on', 'Epochs', 'Pictures', 'Settings', 'How to use it', 'Versions']
    assert page.tags.count('img') == 4 and all(o.startswith('data:image/png;base64,') for o in page.links)
    assert not {'script', 'link', 'iframe'} & set(page.tags)
    assert not re.search(r'url\(|@import|https?://', text)
    assert 'prefers-color-scheme:dark' in text and '@media print' in text and 'width=device-width' in text


def test_the_report_escapes_class_names(run):
    text = (run / 'report.html').read_text(encoding='utf-8')
    assert ODD not in text and ODD in ''.join(Page(text).text)


def test_the_report_says_what_was_measured(run, there):
    text = ''.join(Page((run / 'report.html').read_text(encoding='utf-8')).text).replace('\xa0', ' ')
    learn, history = load_learner(run / 'learner.pkl'), pd.read_csv(run / 'history.csv')
    setup = cli.Setup('labeled', 'unlabeled', arch='test_resnet', pretrained=False, size=32, workers=0, flip=False)
    valid = [o for v in setup.valid.values() for o in v]
    with learn.no_bar():
        probs = learn.get_preds(dl=learn.dls.test_dl(valid))[0]
    right = np.mean([learn.dls.vocab[i] == o.parent.name for i, o in zip(probs.argmax(1), valid)])
    assert len(valid) == 6 and abs(right - history.accuracy.iloc[-1]) < 1e-6
    assert f'{100 * right:.1f} %accuracy on 6 validation images; 95 % interval' in text
    assert 'supervised twin' in text and '1 unlabelled image could not be opened' in text


def test_the_twin_starts_and_ends_alike_without_unlabelled_images(there):
    "Same labels, same starting weights"
    setup = cli.Setup('labeled', 'unlabeled', arch='test_resnet', pretrained=False, size=32, workers=0, steps=2, bs=4)
    semi, twin = setup.learner(), setup.learner(semi=False)
    for a, b in zip(semi.model.state_dict().values(), twin.model.state_dict().values()):
        assert torch.equal(a, b)
    assert semi.dls.train.items == twin.dls.train.items and semi.dls.valid.items == twin.dls.valid.items


def test_a_fresh_choice_of_validation_images_keeps_one_of_each_class():
    files = {'a': list(range(3)), 'b': list(range(100))}
    train, valid = cli._split_valid(files, 0.05, 3)
    assert [len(valid[o]) for o in 'ab'] == [1, 5] and all(sorted([*train[o], *valid[o]]) == files[o] for o in 'ab')


def test_validation_images_are_left_out_of_the_pool(there):
    setup = cli.Setup('labeled', ['labeled', 'unlabeled'], arch='test_resnet', pretrained=False)
    assert len(setup.pool) == 24 - 6 + 25
    assert not set(setup.pool) & {o for v in setup.valid.values() for o in v}


# The recipe for pretrained networks


def of_setup(weights, **kwargs):
    opts = {**dict(arch='test_resnet', size=32, workers=0, flip=False, steps=3, bs=4, mu=2, weights=weights), **kwargs}
    return cli.Setup('labeled', 'unlabeled', **opts)


def test_the_recipe_suits_the_network(there, weights):
    known, new = of_setup(weights), of_setup(None, pretrained=False)
    assert (known.recipe, known.policy_name, new.recipe, new.policy_name) == ('finetune', 'aligned', 'paper', 'fixed')
    assert type(known.learner().fix_match.policy).__name__ == 'AlignedLabels' and type(new.policy).__name__ == 'FixedThreshold'
    assert of_setup(weights, recipe='Paper').policy_name == 'fixed' and of_setup(weights, policy='fixed').recipe == 'finetune'
    assert of_setup(weights, threshold=0.7).policy.threshold == 0.7
    assert [of_setup(weights, recipe=o).head_first for o in ('paper', 'finetune')] == [True, False]


def test_rates_are_the_recipes_own(there, weights, tmp_path):
    own = inspect.signature(cli.Learner.fine_tune_fixmatch).parameters['base_lr'].default
    assert cli.Training(of_setup(weights), tmp_path).lr == own
    assert cli.Training(of_setup(weights, recipe='paper'), tmp_path).lr == 2e-3
    assert cli.Training(of_setup(None, pretrained=False), tmp_path).lr == 3e-3
    assert cli.Training(of_setup(weights), tmp_path, lr=0.1).lr == 0.1


def test_what_the_recipe_is_asked_for(there, weights, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(cli.Learner, 'fine_tune_fixmatch', lambda self, pool, **kwargs: asked.update(kwargs, pool=pool))
    run = cli.Training(of_setup(weights, policy='flexmatch', threshold=0.9), tmp_path, epochs=4, lr=0.02)
    run.fit(run.learn, 'fixmatch', False)
    assert (asked['n_steps'], asked['n_epoch'], asked['base_lr']) == (12, 4, 0.02)
    assert type(asked['policy']).__name__ == 'FlexMatch' and asked['policy'].threshold == 0.9
    assert asked['pool'] is run.learn.fix_match.unlabeled_dl


def test_a_tuned_run_writes_what_any_run_does(tuned, run):
    names = lambda folder: {o.name for o in folder.iterdir() if o.is_file()}  # noqa: E731
    assert names(tuned[0]) == names(run)
    history = pd.read_csv(tuned[0] / 'history.csv')
    assert history.epoch.tolist() == [0, 1, 2] and history.loss_u.isna().tolist() == [True, False, False]
    assert 'finetune: a probe as the head, the first 40 % of the steps on labels alone' in tuned[1]


def test_the_average_is_validated_and_saved(there, weights, tmp_path):
    run = cli.Training(of_setup(weights), tmp_path, epochs=2, lr=0.01)
    learn = run.fit(run.learn, 'fixmatch', False)
    assert learn.fix_match.teacher is learn.model_ema and learn.model_ema.averaged and learn.model_ema.steps == 6


def test_a_tuned_run_is_told_beside_probe_and_chance(tuned, there, weights):
    folder, said = tuned
    learn = of_setup(weights).learner()
    found, last = probe(learn), pd.read_csv(folder / 'history.csv').accuracy.iloc[-1]
    page = ''.join(Page((folder / 'report.html').read_text(encoding='utf-8')).text).replace('\xa0', ' ')
    assert f'{100 * found.accuracy:.1f} %accuracy of the probe' in page and 'chance is 33.3 %' in page
    for text in (said, page):
        assert 'Chance: 33.3 %' in text and f'before the training: {100 * found.accuracy:.1f} %.' in text
        assert f'Difference {100 * (last - found.accuracy):+.1f} points' in text
        assert 'The supervised twin, with the same labels, steps and starting weights' in text
    assert 'recipefinetune' in page and 'policyaligned' in page and 'file of weightsnet.safetensors' in page
    assert 'nan' not in page and 'An epoch on labels alone has neither.' in page and 'of the head alone' not in page


def test_a_new_network_has_no_probe(run):
    page = ''.join(Page((run / 'report.html').read_text(encoding='utf-8')).text).replace('\xa0', ' ')
    assert 'Chance: 33.3 %' in page and 'chance is 33.3 %' in page
    assert 'recipepaper' in page and 'probe' not in page and 'file of weights' not in page


def test_the_twin_of_a_tuned_run_is_the_recipe_on_labels_alone(tuned):
    semi, twin = (pd.read_csv(tuned[0] / o) for o in ('history.csv', 'supervised_history.csv'))
    assert twin.loss_u.isna().all() and twin.loss_x.notna().all() and len(twin) == len(semi)
    known = ['train_loss', 'valid_loss', 'accuracy', 'loss_x']
    pd.testing.assert_series_equal(semi.loc[0, known], twin.loc[0, known])  # head, images and schedule are the same
    assert semi.loc[2, 'valid_loss'] != twin.loc[2, 'valid_loss']


def test_the_paper_for_a_pretrained_network(there, weights, tmp_path, capsys):
    args = [*DATA, *KNOWN, '--weights', weights, '--recipe', 'paper', '--epochs', 1, '--no-check', '--out', tmp_path / 'run']
    assert command(cli.fixmatch_train, *args) == 0
    assert '1 epoch of the head alone, then 1' in (said := capsys.readouterr().out) and 'The probe' in said and 'FixedThreshold' in said
    history = pd.read_csv(tmp_path / 'run' / 'history.csv')
    assert history.epoch.tolist() == [0, 1] and history.loss_u.notna().all()
    page = ''.join(Page((tmp_path / 'run' / 'report.html').read_text(encoding='utf-8')).text)
    assert 'without the first epoch, of the head alone' in page and 'An epoch on labels alone' not in page


# Weights on disk


def body_of(weights, arch='test_resnet'):
    return of_setup(weights, arch=arch).learner(semi=False)


def test_weights_come_from_the_file(there, weights):
    found, learn = load_file(weights), body_of(weights)
    own = learn.model[0].model.state_dict()
    assert own.keys() == found.keys() - {'fc.weight', 'fc.bias'}
    assert all(torch.equal(v, found[k]) for k, v in own.items())
    assert not learn.model[0].model.conv1[0].weight.requires_grad and learn.model[1][-1].weight.requires_grad
    stats = [o for o in learn.dls.valid.after_batch.fs if isinstance(o, Normalize)]
    assert len(stats) == 1 and stats[0].mean.flatten().tolist() == pytest.approx(timm.get_pretrained_cfg('test_resnet').mean)


@pytest.mark.parametrize('kind', ['bare', 'state_dict', 'model', 'parallel', 'without the classifier', 'half precision', 'another classifier'])
def test_ways_to_hold_weights(kind, there, weights, tmp_path):
    sd = load_file(weights)
    headless = {k: v for k, v in sd.items() if not k.startswith('fc.')}
    held = {
        'state_dict': {'state_dict': sd, 'epoch': 3},
        'model': {'model': sd, 'args': {'lr': 0.1}},
        'parallel': {f'module.{k}': v for k, v in sd.items()},
        'without the classifier': headless,
        'half precision': {k: v.half() if v.is_floating_point() else v for k, v in sd.items()},
        'another classifier': {**headless, 'fc.weight': torch.zeros(7, 9), 'fc.bias': torch.zeros(7)},
    }.get(kind, sd)
    torch.save(held, tmp_path / 'net.pth')
    own = body_of(tmp_path / 'net.pth').model[0].model.state_dict()
    for k, v in own.items():
        torch.testing.assert_close(v, sd[k], atol=1e-3 if kind == 'half precision' else 0, rtol=1e-3 if kind == 'half precision' else 0)


def test_weights_of_torchvisions_networks(there, tmp_path):
    net = models.resnet18()
    torch.save(net.state_dict(), tmp_path / 'net.pth')
    body = body_of(tmp_path / 'net.pth', 'resnet18').model[0]
    for a, b in zip((net.conv1, net.bn1, net.layer1, net.layer4), (body[0], body[1], body[4], body[7])):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_weights_of_a_whole_mobilenet(there):
    file = os.environ.get('MOBILENETV2_100')
    if not file or not Path(file).exists():
        pytest.skip("needs weights of timm's mobilenetv2_100, in the file that the variable MOBILENETV2_100 names")
    found, own = load_file(file), body_of(file, 'mobilenetv2_100').model[0].model.state_dict()
    assert all(torch.equal(v, found[k]) for k, v in own.items())


def damage(weights, folder):
    "Files that are no weights of the small network, by what is wrong with them, and what is said of it"
    sd, data = load_file(weights), weights.read_bytes()
    (folder / 'cut.safetensors').write_bytes(data[: len(data) // 2])
    (folder / 'text.pth').write_text('no weights')
    (folder / 'empty.pth').touch()
    torch.save([1, 2], folder / 'list.pth')
    torch.save({'epoch': 3}, folder / 'number.pth')
    torch.save(torch.nn.Linear(2, 2), folder / 'module.pth')  # a program, as any pickle
    torch.save({k: v for k, v in sd.items() if not k.startswith('layer4')}, folder / 'half.pth')
    torch.save({**sd, 'layer5.weight': torch.zeros(3)}, folder / 'more.pth')
    torch.save({**sd, 'conv1.0.weight': torch.zeros(3)}, folder / 'shape.pth')
    torch.save(timm.create_model('test_vit').state_dict(), folder / 'other.pth')


NO_WEIGHTS = {
    'gone.safetensors': 'is not there: give a .safetensors or .pth file',
    '.': 'is not there',
    'cut.safetensors': "can't be read as weights (SafetensorError), it is damaged",
    'text.pth': "can't be read as weights",
    'empty.pth': "can't be read as weights",
    'module.pth': "can't be read as weights",
    'list.pth': 'holds no weights by name',
    'number.pth': 'holds no weights by name',
    'half.pth': 'does not fit --arch test_resnet',
    'more.pth': 'such as layer5.weight',
    'shape.pth': '(1 tensors are missing, unknown or of another shape, such as conv1.0.weight)',
    'other.pth': 'give weights of this network, or the --arch that they are of',
}


@pytest.mark.parametrize('name', NO_WEIGHTS)
def test_files_that_hold_no_weights(name, there, weights, tmp_path, capsys):
    damage(weights, tmp_path)
    for func, more in ((cli.fixmatch_train, ['--out', tmp_path / 'run']), (cli.check_command, [])):
        args = KNOWN[:-2] if func is cli.check_command else KNOWN
        assert command(func, *DATA, *args, '--weights', tmp_path / name, *more) == 2
        err = capsys.readouterr().err.strip()
        assert NO_WEIGHTS[name] in err and err.startswith(f'{func.__name__}: --weights ') and '\n' not in err
    assert not (tmp_path / 'run').exists()


# Mistakes: a sentence, exit code 2, and nothing is written

BAD = {
    'no folder': ('--labeled nowhere --unlabeled unlabeled', 'is not a folder'),
    'no images': ('--labeled empty --unlabeled unlabeled', 'holds no folder with images'),
    'one class': ('--labeled one --unlabeled unlabeled', 'two or more'),
    'a class of one image': ('--labeled few --unlabeled unlabeled', 'only one labelled image'),
    'no pool': ('--labeled labeled', '--unlabeled'),
    'empty pool': ('--labeled labeled --unlabeled empty', 'holds no images'),
    'pool is a file': ('--labeled labeled --unlabeled file', 'is not a folder'),
    'damaged label': ('--labeled damaged --unlabeled unlabeled', "damaged/b/cut.png can't be opened"),
    'other classes': ('--labeled labeled --unlabeled unlabeled --valid strange', "a class 'strange' that --labeled has not"),
    'the same images': ('--labeled labeled --unlabeled unlabeled --valid labeled', 'share images'),
    'arch': ('--labeled labeled --unlabeled unlabeled --arch resnet81', 'did you mean resnet'),
    'policy': ('--labeled labeled --unlabeled unlabeled --policy flexmach', 'did you mean flexmatch'),
    'threshold': ('--labeled labeled --unlabeled unlabeled --threshold 95', 'between 0 and 1'),
    'threshold of softmatch': ('--labeled labeled --unlabeled unlabeled --policy softmatch --threshold 0.9', 'finds its own'),
    'forward': ('--labeled labeled --unlabeled unlabeled --forward join', 'did you mean joint'),
    'recipe': ('--labeled labeled --unlabeled unlabeled --recipe finetun', 'did you mean finetune'),
    'recipe of another network': ('--labeled labeled --unlabeled unlabeled --recipe finetune', 'leave out --no-pretrained, or use --recipe paper'),
    'weights of none': ('--labeled labeled --unlabeled unlabeled --weights file', 'leave out one of the two'),
    'bs': ('--labeled labeled --unlabeled unlabeled --bs 0', '--bs must be 1 or more'),
    'epochs': ('--labeled labeled --unlabeled unlabeled --epochs 0', '--epochs must be 1 or more'),
    'lr': ('--labeled labeled --unlabeled unlabeled --lr -1', '--lr must be above 0'),
    'valid-pct': ('--labeled labeled --unlabeled unlabeled --valid-pct 1', '--valid-pct must be between 0 and 1'),
    'not a number': ('--labeled labeled --unlabeled unlabeled --epochs many', 'invalid int value'),
    'out is a file': ('--labeled labeled --unlabeled unlabeled --out file', 'is a file'),
    'out cannot be': ('--labeled labeled --unlabeled unlabeled --no-check --out file/run', "can't be written to"),
}


@pytest.mark.parametrize('name', BAD)
def test_a_mistake_is_one_sentence(name, there, capsys):
    args, said = BAD[name]
    for folder, n in (('one/a', 2), ('few/a', 1), ('few/b', 3), ('strange/strange', 1)):
        if not Path(folder).exists():
            Path(folder).mkdir(parents=True)
            for o in get_image_files('unlabeled/deeper').sorted()[:n]:
                shutil.copy(o, folder)
    if not Path('damaged').exists():
        shutil.copytree('labeled/1', 'damaged/a')
        shutil.copytree('labeled/2', 'damaged/b')
        shutil.copy('new/cut_short.png', 'damaged/b/cut.png')
    before = sorted(there.rglob('*'))
    extra = [] if '--out' in args else ['--out', 'wrong']
    assert command(cli.fixmatch_train, *SMALL[:-2], *args.split(), *extra) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and 'Traceback' not in err
    assert name == 'not a number' or (err.startswith('fixmatch_train: ') and '\n' not in err)
    assert sorted(there.rglob('*')) == before


def test_passes_of_the_recipe_are_its_own(there, weights, capsys):
    for forward in ('split', 'selective'):
        assert command(cli.fixmatch_train, *DATA, *KNOWN, '--weights', weights, '--forward', forward, '--out', 'wrong') == 2
        assert f"--forward {forward} can't be given with --recipe finetune" in (err := capsys.readouterr().err) and '\n' not in err.strip()
    assert of_setup(weights, recipe='paper', forward='split').forward == 'split'


def test_a_run_is_not_written_over(run, there, capsys):
    assert train('--out', 'run') == 2
    assert 'holds a run already' in capsys.readouterr().err


def test_weights_that_cannot_be_had(there, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError('no route')

    monkeypatch.setattr(cli, 'vision_learner', offline)
    assert command(cli.fixmatch_train, *DATA, '--arch', 'resnet18', '--out', 'wrong') == 2
    err = capsys.readouterr().err
    assert 'The pretrained weights of resnet18' in err and '--no-pretrained' in err and '--weights' in err and '\n' not in err.strip()


def test_problems_of_the_preflight_stop_a_run(there, tmp_path, capsys):
    setup = cli.Setup('labeled', 'unlabeled', arch='test_resnet', pretrained=False)
    shutil.copy(setup.valid['1'][0], tmp_path / 'copied.png')
    assert train('--out', 'wrong', data=['--labeled', 'labeled', '--unlabeled', 'unlabeled', tmp_path]) == 2
    err = capsys.readouterr().err
    assert 'the preflight found 1 problem;' in err and 'in validation' in err and 'copied.png' in err
    assert not Path('wrong').exists()


# Ctrl-C, and on


def same_histories(a, b, name='history.csv'):
    h, g = (pd.read_csv(o / name).drop(columns='time') for o in (a, b))
    pd.testing.assert_frame_equal(h, g)


def verdict(said):
    "What is said of a whole run at its end"
    return [o for o in said.splitlines() if re.search('validation images right|^Chance|^The probe|^Difference|^The supervised twin, with', o)]


def same_runs(a, b):
    a_, b_ = (load_file(o / 'weights.safetensors') for o in (a, b))
    assert a_.keys() == b_.keys() and all(torch.equal(v, b_[k]) for k, v in a_.items())
    same_histories(a, b)
    p, q = (pd.read_csv(o / 'pseudo_labels.csv') for o in (a, b))
    pd.testing.assert_frame_equal(p, q)


def interrupt(monkeypatch, at):
    "Ctrl-C in step `at` of the run, counted through all fits"
    real, n = experiment._Lines.after_batch, [0]

    def after_batch(self):
        real(self)
        n[0] += 1
        if n[0] == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(experiment._Lines, 'after_batch', after_batch)


def head_first(self, dls, **kwargs):
    "As with pretrained weights, without any"
    learn = cli.vision_learner(dls, self.arch, pretrained=False, metrics=cli.accuracy, **kwargs)
    learn.freeze()
    return learn


@pytest.mark.parametrize('pretrained', [False, True])
def test_ctrl_c_and_resume_end_where_the_whole_run_does(pretrained, there, tmp_path, capsys, monkeypatch):
    small = [*KNOWN, '--recipe', 'paper'] if pretrained else SMALL
    if pretrained:
        monkeypatch.setattr(cli.Setup, '_network', head_first)
    args = [*DATA, *small, '--epochs', 2, '--ema', '--no-check']
    go = lambda *more: command(cli.fixmatch_train, *args, *more)  # noqa: E731
    assert go('--out', tmp_path / 'whole') == 0
    with monkeypatch.context() as m:
        interrupt(m, 8 if pretrained else 5)
        assert go('--out', tmp_path / 'cut') == 130
    err = capsys.readouterr().err
    assert 'All finished epochs are saved' in err and '--resume' in err and 'Traceback' not in err
    assert not (tmp_path / 'cut' / 'learner.pkl').exists() and len(pd.read_csv(tmp_path / 'cut' / 'history.csv')) == 1 + pretrained
    assert go('--out', tmp_path / 'cut', '--resume') == 0
    same_runs(tmp_path / 'whole', tmp_path / 'cut')
    assert pd.read_csv(tmp_path / 'cut' / 'history.csv').epoch.tolist() == list(range(2 + pretrained))


@pytest.mark.parametrize('at,done', [(5, 1), (8, 2)])
def test_a_tuned_run_resumes(at, done, there, weights, tuned, tmp_path, capsys, monkeypatch):
    "On labels alone, and with the pool"
    args = [*DATA, *KNOWN, '--weights', weights, '--epochs', 3, '--compare', '--out', tmp_path / 'cut']
    with monkeypatch.context() as m:
        interrupt(m, at)
        assert command(cli.fixmatch_train, *args) == 130
    assert len(pd.read_csv(tmp_path / 'cut' / 'history.csv')) == done
    assert command(cli.fixmatch_train, *args, '--resume') == 0
    same_runs(tuned[0], tmp_path / 'cut')
    same_histories(tuned[0], tmp_path / 'cut', 'supervised_history.csv')
    assert verdict(capsys.readouterr().out) == verdict(tuned[1])


def test_the_twin_of_a_tuned_run_resumes(there, weights, tuned, tmp_path, capsys, monkeypatch):
    args = [*DATA, *KNOWN, '--weights', weights, '--epochs', 3, '--compare', '--out', tmp_path / 'cut']
    with monkeypatch.context() as m:
        interrupt(m, 9 + 5)
        assert command(cli.fixmatch_train, *args) == 130
    assert len(pd.read_csv(tmp_path / 'cut' / 'supervised_history.csv')) == 1
    assert command(cli.fixmatch_train, *args, '--resume') == 0
    same_runs(tuned[0], tmp_path / 'cut')
    same_histories(tuned[0], tmp_path / 'cut', 'supervised_history.csv')
    assert verdict(capsys.readouterr().out) == verdict(tuned[1])


def test_ctrl_c_in_the_first_epoch(there, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as m:
        interrupt(m, 2)
        assert train('--epochs', 1, '--no-check', '--out', tmp_path / 'cut') == 130
    assert 'No epoch was finished' in capsys.readouterr().err
    assert train('--epochs', 1, '--no-check', '--out', tmp_path / 'cut', '--resume') == 0


@pytest.mark.parametrize(
    'other,said', [(('--epochs', 3), '--epochs'), (('--epochs', 2, '--size', 40), '--size'), (('--epochs', 2, '--policy', 'fixed'), '--policy')]
)
def test_another_run_is_not_resumed(other, said, run, there, capsys):
    before = (run / 'learner.pkl').read_bytes()
    args = [*DATA, *SMALL, '--policy', 'FreeMatch', '--out', 'run', '--resume', '--no-check', *other]
    assert command(cli.fixmatch_train, *args) == 2
    err = capsys.readouterr().err
    assert 'holds a run with another ' + said in err and '\n' not in err.strip()
    assert (run / 'learner.pkl').read_bytes() == before


@pytest.mark.parametrize(
    'other,said', [(('--recipe', 'paper', '--policy', 'aligned'), '--recipe (finetune there, paper here)'), (('--weights', 'copied.safetensors'), '--weights')]
)
def test_another_tuned_run_is_not_resumed(other, said, tuned, there, weights, capsys):
    shutil.copy(weights, 'copied.safetensors')
    args = [*DATA, *KNOWN, '--weights', weights, '--epochs', 3, '--out', 'tuned', '--resume', '--no-check', *other]
    assert command(cli.fixmatch_train, *args) == 2
    assert 'holds a run with another ' + said in (err := capsys.readouterr().err) and '\n' not in err.strip()


def test_a_run_of_a_version_without_recipes_is_resumed(there, tmp_path, capsys):
    args = ('--epochs', 1, '--no-check', '--out', tmp_path / 'old')
    assert train(*args) == 0
    file = tmp_path / 'old' / 'models' / 'options.json'
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in ('recipe', 'weights')}))
    assert train(*args, '--resume') == 0
    assert 'nothing is left to train' in capsys.readouterr().out


def test_checkpoints_own_check_is_told_too(run, there, capsys):
    "The labelled images have changed since"
    shutil.copytree('labeled', 'fewer')
    next(Path('fewer/1').iterdir()).unlink()
    args = ['--labeled', 'fewer', '--unlabeled', 'unlabeled', *SMALL, '--policy', 'FreeMatch', '--epochs', 2, '--out', 'run', '--resume', '--no-check']
    before = (run / 'learner.pkl').read_bytes()
    assert command(cli.fixmatch_train, *args) == 2
    assert (run / 'learner.pkl').read_bytes() == before
    err = capsys.readouterr().err
    assert 'checkpoint of another run' in err and 'give another --out' in err


@pytest.mark.skipif(os.name == 'nt', reason='signals are others there')
def test_a_whole_process_stops_at_ctrl_c(there, tmp_path):
    code = 'from fixmatch_fastai.cli import fixmatch_train; fixmatch_train()'
    args = [*DATA, *SMALL, '--workers', '1', '--epochs', '500', '--no-check', '--out', str(tmp_path / 'cut')]
    process = subprocess.Popen([sys.executable, '-c', code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if line.startswith('epoch 1'):  # the checkpoint of the one before is written
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: workers get it too
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and '--resume to go on' in err and 'Traceback' not in err
    assert (tmp_path / 'cut' / 'models' / 'fixmatch.pth').exists()


# Predict


def test_predictions_are_the_learners_own(run, there, tmp_path, capsys):
    assert command(cli.fixmatch_predict, '--learner', 'run/learner.pkl', 'new', '--out', tmp_path / 'p.csv', '--workers', 0, '--bs', 4, '--topk', 9) == 0
    df, learn = pd.read_csv(tmp_path / 'p.csv'), load_learner(run / 'learner.pkl')
    files = get_image_files('new').sorted()
    assert df.file.tolist() == [str(o) for o in files]
    bad = df.error.notna()
    assert df.file[bad].tolist() == ['new/cut_short.png'] and df.predicted[bad].isna().all()
    assert "1 of 7 files can't be opened, such as new/cut_short.png" in capsys.readouterr().err
    with learn.no_bar():
        probs = learn.get_preds(dl=learn.dls.test_dl([o for o in files if o.name != 'cut_short.png']))[0]
    for k, name in enumerate(('', '_2', '_3')):
        np.testing.assert_allclose(df[f'confidence{name}'][~bad], probs.sort(descending=True).values[:, k], atol=1e-5)
    assert df.predicted[~bad].tolist() == [learn.dls.vocab[i] for i in probs.argmax(1)]


def test_predictions_of_views_are_blended(run, there):
    "Where a view is the image itself, nothing changes"
    learn, files = load_learner(run / 'learner.pkl'), [o for o in get_image_files('new').sorted() if o.name != 'cut_short.png']
    plain, views = (torch.stack([o for _, o, _ in cli.predictions(learn, files, tta=o, bs=4)]) for o in (False, True))
    assert (plain - views).abs().max() > 1e-5
    torch.testing.assert_close(views.sum(1), torch.ones(len(files)))
    ds = self_training._Opened(learn.dls.test_dl(files), 2)
    assert not any(torch.equal(ds[i][1][0], o) for i in range(len(files)) for o in ds[i][1][1:])
    same = torch.stack([ds[i][1][[0, 0, 0]] for i in range(len(files))])
    torch.testing.assert_close(self_training._outputs(learn, same, False), plain, atol=1e-5, rtol=0)


def test_only_damaged_files(run, there, tmp_path, capsys):
    assert command(cli.fixmatch_predict, '--learner', 'run/learner.pkl', 'new/cut_short.png', 'gone.png', '--out', tmp_path / 'p.csv', '--workers', 0) == 1
    df = pd.read_csv(tmp_path / 'p.csv')
    assert df.error.str.contains('FileNotFoundError').tolist() == [False, True]


@pytest.mark.parametrize('args,said', [(('--learner', 'gone.pkl', 'new'), 'is not there'), (('--learner', 'file', 'new'), "can't be loaded"), (('--learner', 'run/learner.pkl', 'empty'), 'holds no images'), (('--learner', 'run/learner.pkl', 'new', 'nowhere'), 'nowhere is not there'), (('--learner', 'run/learner.pkl', 'gone.png'), 'gone.png is not there'), (('--learner', 'run/weights.safetensors', 'new'), 'holds weights alone'),
                                       (('--learner', 'run/learner.pkl', 'new', '--out', 'empty'), 'is a folder'), (('--learner', 'run/learner.pkl', 'new', '--topk', 0), '--topk must be')])  # fmt: skip
def test_mistakes_of_predict(args, said, run, there, capsys):
    assert command(cli.fixmatch_predict, *args) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith('fixmatch_predict: ') and '\n' not in err.strip()
    assert not Path('predictions.csv').exists()


# Check


def test_check_says_whether_there_are_problems(there, tmp_path, capsys):
    check = lambda *args: command(cli.check_command, '--labeled', 'labeled', '--unlabeled', 'unlabeled', *args, *SMALL[:-2], '--no-speed')  # noqa: E731
    before = sorted(there.rglob('*'))
    assert check() == 0
    assert 'labels' in (out := capsys.readouterr().out) and '0 problems' in out and 'damaged.png' in out
    setup = cli.Setup('labeled', 'unlabeled', arch='test_resnet', pretrained=False)
    shutil.copy(setup.valid['2'][0], tmp_path / 'copied.png')
    assert check(tmp_path) == 1
    assert 'copied.png' in (out := capsys.readouterr().out) and '1 problem' in out
    assert check('--policy', 'none') == 2
    assert capsys.readouterr().err.startswith('fixmatch_check: --policy none is not known')
    assert check('--recipe', 'none') == 2
    assert capsys.readouterr().err.startswith('fixmatch_check: --recipe none is not known')
    assert sorted(there.rglob('*')) == before


def test_check_looks_at_weights_on_disk(there, weights, capsys):
    assert command(cli.check_command, *DATA, *KNOWN[:-2], '--weights', weights, '--no-speed') == 0
    assert '0 problems' in capsys.readouterr().out


# Commands


def test_all_commands_are_installed():
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    scripts = dict(o.strip().split('=') for o in ini['DEFAULT']['console_scripts'].split('\n'))
    assert set(scripts) == {'fixmatch_train', 'fixmatch_predict', 'fixmatch_check', 'fixmatch_demo', 'fixmatch_experiment'}
    for name, target in scripts.items():
        module, func = target.split(':')
        func = getattr(importlib.import_module(module), func)
        assert func.__name__ == ('main' if name in ('fixmatch_demo', 'fixmatch_experiment') else name)


@pytest.mark.parametrize('func', [cli.fixmatch_train, cli.fixmatch_predict, cli.check_command])
def test_help_says_something_of_each_option(func, capsys):
    assert command(func, '--help') == 0
    out = capsys.readouterr().out
    assert 'Example: ' in out and out.startswith(f'usage: {func.__name__}')
    for action in func.parser()._actions:
        assert action.help and len(action.help) > 3


def test_help_says_what_an_option_means_with_either_recipe():
    said = {o.dest: o.help for o in cli.fixmatch_train.parser()._actions}
    for option in ('recipe', 'policy', 'epochs', 'lr', 'ema', 'forward'):
        assert 'finetune' in said[option] or 'with --recipe paper' in said[option], option
    assert 'left out: finetune for a pretrained network, paper with --no-pretrained' in said['recipe']
    assert 'left out: aligned with --recipe finetune, fixed with paper' in said['policy']
    assert '.safetensors or .pth' in said['weights']
    named = said['policy'].split('count: ')[1].split(';')[0].split(', ')
    assert set(named) == set(experiment.named_policies)


def test_commands_are_functions(there):
    with pytest.raises(cli.CommandError, match='is not a folder'):
        cli.fixmatch_train('out', labeled='nowhere', unlabeled='unlabeled')
    with pytest.raises(TypeError, match='labelled'):
        cli.fixmatch_train('out', labelled='labeled', unlabeled='unlabeled')
    assert 'labeled' in inspect.signature(cli.Setup).parameters


def test_a_log_has_a_line_for_each_tenth(capsys):
    progress = cli.Progress(1003)
    for i in range(1003):
        progress.update(i + 1)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[-1] == 'step 1,003 of 1,003'


def test_the_demo_is_quiet_in_a_log(tmp_path, capsys):
    cli.main(['--labels', '20', '--steps', '4', '--seeds', '1', '--out', str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [o for o in lines if o.startswith('step ')] == [f'step {i} of 8' for i in range(1, 9)] and len(lines) <= 20


def test_either_spelling_of_labelled(there, capsys):
    for labeled, unlabeled in (('--labeled', '--unlabeled'), ('--labelled', '--unlabelled')):
        assert command(cli.check_command, labeled, 'labeled', unlabeled, 'unlabeled', *SMALL[:-2], '--no-speed') in (0, 1)
    assert command(cli.check_command, '--labelled=labeled', '--unlabelled', 'unlabeled', *SMALL[:-2], '--no-speed') in (0, 1)


def test_advice_is_in_words_of_the_command_line():
    from fixmatch_fastai import check, record

    slow = "Let workers prepare images while the model trains: `dls.unlabeled_dl(files, num_workers=4)`."
    assert cli.in_options(slow) == 'Let workers prepare images while the model trains: --workers.' and slow[:40] in Path(check.__file__).read_text()
    assert '--policy freematch' in cli.in_options(record._warnings['none_counts']) and '`' not in cli.in_options(record._warnings['none_counts'])
    assert cli.in_options('replaced, such as a.png (OSError): `learn.fix_match.damaged` lists them.') == 'replaced, such as a.png (OSError).'
