"`fixmatch_train`: what its options amount to, weights on disk, mistakes, Ctrl-C and on"

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pandas as pd
import pytest
import timm
import torch
from cli_runs import *  # noqa: F403  fixtures
from cli_runs import DATA, KNOWN, SMALL, Page, exit_code, learner, options, same_histories, same_runs, train, verdict
from fastai.vision.all import Learner, Normalize, get_image_files, models
from PIL import Image
from safetensors.torch import load_file

from fixmatch_fastai.cli import learner as learner_room
from fixmatch_fastai.cli.check import check_command
from fixmatch_fastai.cli.folders import find_images, split_valid
from fixmatch_fastai.cli.learner import network_named
from fixmatch_fastai.cli.options import Options, policies
from fixmatch_fastai.cli.train import fixmatch_train
from fixmatch_fastai.cli.training import Training, fit
from fixmatch_fastai.console import CommandError, Progress
from fixmatch_fastai.experiment.policies import named_policies

# Images


def test_a_fresh_choice_of_validation_images_keeps_one_of_each_class():
    files = {'a': list(range(3)), 'b': list(range(100))}
    train, valid = split_valid(files, 0.05, 3)
    assert [len(valid[o]) for o in 'ab'] == [1, 5]
    assert all(sorted([*train[o], *valid[o]]) == files[o] for o in 'ab')


def test_validation_images_are_left_out_of_the_pool(there):
    images = find_images(options(unlabeled=['labeled', 'unlabeled']))
    assert len(images.pool) == 24 - 6 + 25
    assert not set(images.pool) & {o for v in images.valid.values() for o in v}


def test_a_validation_folder_may_lack_a_class(there, tmp_path):
    shutil.copytree('labeled/1', tmp_path / '1')
    for i, o in enumerate((tmp_path / '1').iterdir()):
        o.rename(o.with_name(f'other{i}.png'))
    images = find_images(options(valid=tmp_path))
    assert [len(v) for v in images.valid.values()] == [8] and sum(map(len, images.train.values())) == 24


def test_the_twin_starts_alike(there):
    "Same labels, same starting weights"
    semi, twin = learner(), learner(semi=False)
    for a, b in zip(semi.model.state_dict().values(), twin.model.state_dict().values()):
        assert torch.equal(a, b)
    assert semi.dls.train.items == twin.dls.train.items and semi.dls.valid.items == twin.dls.valid.items


# Recipes


def training(weights=None, epochs=None, lr=None, **kwargs):
    o = options(weights, **kwargs)
    return Training(o, find_images(o), Path('nowhere'), epochs, lr)


def test_the_recipe_suits_the_network(there, weights):
    known, new = options(weights), options()
    assert (known.recipe, known.policy, new.recipe, new.policy) == ('finetune', 'aligned', 'paper', 'fixed')
    assert type(learner(weights).fix_match.policy).__name__ == 'AlignedLabels'
    assert type(learner().fix_match.policy).__name__ == 'FixedThreshold'
    assert options(weights, recipe='Paper').policy == 'fixed' and options(weights, policy='fixed').recipe == 'finetune'
    assert learner(weights, threshold=0.7).fix_match.policy.threshold == 0.7
    assert [options(weights, recipe=o).head_first for o in ('paper', 'finetune')] == [True, False]


def test_batches_are_the_recipes_own(there, weights):
    given = options(weights, bs=None, mu=None), options(bs=None, mu=None), options(bs=3, mu=1)
    assert [(o.bs, o.mu) for o in given] == [(8, 4), (16, 7), (3, 1)]


def test_rates_are_the_recipes_own(there, weights):
    own = inspect.signature(Learner.fine_tune_fixmatch).parameters['base_lr'].default
    assert training(weights).lr == own
    assert training(weights, recipe='paper').lr == 2e-3
    assert training().lr == 3e-3
    assert training(weights, lr=0.1).lr == 0.1
    assert [training(weights).epochs, training().epochs, training(epochs=2).epochs] == [3, 5, 2]


def test_what_the_recipe_is_asked_for(there, weights, monkeypatch):
    asked = {}
    monkeypatch.setattr(Learner, 'fine_tune_fixmatch', lambda self, pool, **kwargs: asked.update(kwargs, pool=pool))
    run = training(weights, policy='flexmatch', threshold=0.9, epochs=4, lr=0.02)
    learn = fit(run, run.learner(), 'fixmatch')
    assert (asked['n_steps'], asked['n_epoch'], asked['base_lr']) == (12, 4, 0.02)
    assert type(asked['policy']).__name__ == 'FlexMatch' and asked['policy'].threshold == 0.9
    assert asked['pool'] is learn.fix_match.unlabeled_dl


def test_passes_of_the_recipe_are_its_own(there, weights, capsys):
    for forward in ('split', 'selective'):
        args = [*KNOWN, '--weights', weights, '--forward', forward, '--out', 'wrong']
        assert exit_code(fixmatch_train, *DATA, *args) == 2
        err = capsys.readouterr().err.strip()
        assert f"--forward {forward} can't be given with --recipe finetune" in err and '\n' not in err
    assert options(weights, recipe='paper', forward='split').forward == 'split'


def test_help_says_what_an_option_means_with_either_recipe():
    text = {o.dest: o.help for o in fixmatch_train.parser().options}
    for option in ('recipe', 'policy', 'epochs', 'lr', 'ema', 'forward'):
        assert 'finetune' in text[option] or 'with --recipe paper' in text[option], option
    assert 'left out: finetune for a pretrained network, paper with --no-pretrained' in text['recipe']
    assert 'left out: aligned with --recipe finetune, fixed with paper' in text['policy']
    assert '.safetensors or .pth' in text['weights']
    named = text['policy'].split('count: ')[1].split(';')[0].split(', ')
    assert set(named) == set(policies) == set(named_policies)


def test_commands_are_functions(there):
    with pytest.raises(CommandError, match='is not a folder'):
        fixmatch_train('out', labeled='nowhere', unlabeled='unlabeled')
    with pytest.raises(TypeError, match='labelled'):
        fixmatch_train('out', labelled='labeled', unlabeled='unlabeled')
    assert 'labeled' in inspect.signature(Options).parameters


@pytest.mark.slow
def test_a_tuned_run_is_on_labels_alone_at_first(tuned):
    history = pd.read_csv(tuned[0] / 'history.csv')
    assert history.epoch.tolist() == [0, 1, 2] and history.loss_u.isna().tolist() == [True, False, False]
    assert 'finetune: a probe as the head, the first 40 % of the steps on labels alone' in tuned[1]


@pytest.mark.slow
def test_the_average_is_validated_and_saved(there, weights, tmp_path):
    o = options(weights)
    run = Training(o, find_images(o), tmp_path, epochs=2, lr=0.01)
    learn = fit(run, run.learner(), 'fixmatch')
    assert learn.fix_match.teacher is learn.model_ema and learn.model_ema.averaged and learn.model_ema.steps == 6


@pytest.mark.slow
def test_the_twin_of_a_tuned_run_is_the_recipe_on_labels_alone(tuned):
    semi, twin = (pd.read_csv(tuned[0] / o) for o in ('history.csv', 'supervised_history.csv'))
    assert twin.loss_u.isna().all() and twin.loss_x.notna().all() and len(twin) == len(semi)
    known = ['train_loss', 'valid_loss', 'accuracy', 'loss_x']
    pd.testing.assert_series_equal(semi.loc[0, known], twin.loc[0, known])  # head, images and schedule are the same
    assert semi.loc[2, 'valid_loss'] != twin.loc[2, 'valid_loss']


@pytest.mark.slow
def test_the_paper_for_a_pretrained_network(there, weights, tmp_path, capsys, undrawn):
    out = tmp_path / 'run'
    args = [*DATA, *KNOWN, '--weights', weights, '--recipe', 'paper', '--epochs', 1, '--no-check', '--out', out]
    assert exit_code(fixmatch_train, *args) == 0
    printed = capsys.readouterr().out
    assert '1 epoch of the head alone, then 1' in printed and 'The probe' in printed and 'FixedThreshold' in printed
    history = pd.read_csv(out / 'history.csv')
    assert history.epoch.tolist() == [0, 1] and history.loss_u.notna().all()
    page = Page(out / 'report.html').text
    assert 'without the first epoch, of the head alone' in page and 'An epoch on labels alone' not in page


@pytest.mark.slow
def test_a_pool_that_is_left_out_is_reported(weights, there, tmp_path, capsys, undrawn):
    "After steps as long as these the network contradicts the probe"
    args = [*DATA, *KNOWN[:-1], '3', '--weights', weights, '--epochs', 3, '--no-check', '--out', tmp_path]
    assert exit_code(fixmatch_train, *args) == 0
    assert 'The unlabelled images were left out' in capsys.readouterr().out
    assert 'The unlabelled images were left out' in Page(tmp_path / 'report.html').text


# Weights on disk


def body_of(weights, arch='test_resnet'):
    return learner(weights, semi=False, arch=arch)


def test_weights_come_from_the_file(there, weights):
    found, learn = load_file(weights), body_of(weights)
    own = learn.model[0].model.state_dict()
    assert own.keys() == found.keys() - {'fc.weight', 'fc.bias'}
    assert all(torch.equal(v, found[k]) for k, v in own.items())
    assert not learn.model[0].model.conv1[0].weight.requires_grad and learn.model[1][-1].weight.requires_grad
    stats = [o for o in learn.dls.valid.after_batch.fs if isinstance(o, Normalize)]
    mean = timm.get_pretrained_cfg('test_resnet').mean
    assert len(stats) == 1 and stats[0].mean.flatten().tolist() == pytest.approx(mean)


WAYS = ['bare', 'state_dict', 'model', 'parallel', 'without the classifier', 'half precision', 'another classifier']


@pytest.mark.parametrize('way', WAYS)
def test_ways_to_hold_weights(way, there, weights, tmp_path):
    sd = load_file(weights)
    headless = {k: v for k, v in sd.items() if not k.startswith('fc.')}
    held = {
        'state_dict': {'state_dict': sd, 'epoch': 3},
        'model': {'model': sd, 'args': {'lr': 0.1}},
        'parallel': {f'module.{k}': v for k, v in sd.items()},
        'without the classifier': headless,
        'half precision': {k: v.half() if v.is_floating_point() else v for k, v in sd.items()},
        'another classifier': {**headless, 'fc.weight': torch.zeros(7, 9), 'fc.bias': torch.zeros(7)},
    }.get(way, sd)
    torch.save(held, tmp_path / 'net.pth')
    tolerance = 1e-3 if way == 'half precision' else 0
    for k, v in body_of(tmp_path / 'net.pth').model[0].model.state_dict().items():
        torch.testing.assert_close(v, sd[k], atol=tolerance, rtol=tolerance)


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
    "Files that are no weights of the small network"
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
    for func, args in ((fixmatch_train, [*KNOWN, '--out', tmp_path / 'run']), (check_command, KNOWN[:-2])):
        assert exit_code(func, *DATA, *args, '--weights', tmp_path / name) == 2
        err = capsys.readouterr().err.strip()
        assert NO_WEIGHTS[name] in err and err.startswith(f'{func.parser().prog}: --weights ') and '\n' not in err
    assert not (tmp_path / 'run').exists()


def test_networks_that_are_offered_are_known():
    assert network_named('xresnet18')(n_out=3) is not None and network_named('resnet18').__name__ == 'resnet18'


# Mistakes: a sentence, exit code 2, and nothing is written

BAD = {  # options, beside those of good folders, and what is answered
    'no folder': ('--labeled nowhere', 'is not a folder'),
    'no images': ('--labeled empty', 'holds no folder with images'),
    'one class': ('--labeled one', 'two or more'),
    'a class of one image': ('--labeled few', 'only one labelled image'),
    'empty pool': ('--unlabeled empty', 'holds no images'),
    'pool is a file': ('--unlabeled file', 'is not a folder'),
    'damaged label': ('--labeled damaged', "damaged/b/cut.png can't be opened"),
    'other classes': ('--valid strange', "a class 'strange' that --labeled has not"),
    'the same images': ('--valid labeled', 'share images'),
    'arch': ('--arch xresnet81', 'did you mean xresnet18'),
    'policy': ('--policy flexmach', 'did you mean flexmatch'),
    'threshold': ('--threshold 95', 'between 0 and 1'),
    'threshold of softmatch': ('--policy softmatch --threshold 0.9', 'finds its own'),
    'forward': ('--forward join', 'did you mean joint'),
    'recipe': ('--recipe finetun', 'did you mean finetune'),
    'recipe of another network': ('--recipe finetune', 'leave out --no-pretrained'),
    'weights of none': ('--weights file', 'leave out one of the two'),
    'option': ('--polcy fixed', 'did you mean --policy'),
    'bs': ('--bs 0', '--bs must be 1 or more'),
    'epochs': ('--epochs 0', '--epochs must be 1 or more'),
    'lr': ('--lr -1', '--lr must be above 0'),
    'valid-pct': ('--valid-pct 1', '--valid-pct must be between 0 and 1'),
    'not a number': ('--epochs many', 'invalid int value'),
    'out is a file': ('--out file', 'is a file'),
    'out cannot be': ('--no-check --out file/run', "can't be written to"),
}


@pytest.fixture
def wrong_folders(there):
    for folder, n in (('one/a', 2), ('few/a', 1), ('few/b', 3), ('strange/strange', 1)):
        if not Path(folder).exists():
            Path(folder).mkdir(parents=True)
            for o in get_image_files('unlabeled/deeper').sorted()[:n]:
                shutil.copy(o, folder)
    if not Path('damaged').exists():
        shutil.copytree('labeled/1', 'damaged/a')
        shutil.copytree('labeled/2', 'damaged/b')
        shutil.copy('new/cut_short.png', 'damaged/b/cut.png')
    return there


@pytest.mark.parametrize('name', BAD)
def test_a_mistake_is_one_sentence(name, wrong_folders, capsys):
    args, text = BAD[name]
    before = sorted(wrong_folders.rglob('*'))
    extra = [] if '--out' in args else ['--out', 'wrong']
    assert exit_code(fixmatch_train, *DATA, *SMALL[:-2], *args.split(), *extra) == 2
    err = capsys.readouterr().err.strip()
    assert text in err and 'Traceback' not in err
    assert name == 'not a number' or (err.startswith('fixmatch_train: ') and '\n' not in err)
    assert sorted(wrong_folders.rglob('*')) == before


def test_without_a_pool_nothing_is_trained(there, capsys):
    assert exit_code(fixmatch_train, *SMALL, '--labeled', 'labeled', '--out', 'wrong') == 2
    assert 'There are no unlabelled images: give a folder of them with --unlabeled.' in capsys.readouterr().err


def test_weights_that_cannot_be_had(there, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError('no route')

    monkeypatch.setattr(learner_room, 'vision_learner', offline)
    assert exit_code(fixmatch_train, *DATA, '--arch', 'resnet18', '--out', 'wrong') == 2
    err = capsys.readouterr().err.strip()
    assert 'The pretrained weights of resnet18' in err and '--no-pretrained' in err and '--weights' in err
    assert '\n' not in err


def test_problems_of_the_preflight_stop_a_run(there, tmp_path, capsys):
    Image.open(find_images(options()).valid['1'][0]).save(tmp_path / 'saved_again.bmp')
    assert train('--out', 'wrong', data=[*DATA, tmp_path]) == 2
    err = capsys.readouterr().err
    assert 'the preflight found 1 problem;' in err and 'in validation' in err and 'saved_again.bmp' in err
    assert not Path('wrong').exists()


@pytest.mark.slow
def test_a_run_is_not_written_over(run, there, capsys):
    assert train('--out', 'run') == 2
    assert 'holds a run already' in capsys.readouterr().err


# Ctrl-C, and on


@pytest.fixture
def interrupt(monkeypatch):
    "Ctrl-C in step `at` of the run, counted through all fits; without one, no more"
    update = Progress.update

    def interrupt(at=None):
        counted = [0]

        def stopping(self, done):
            update(self, done)
            counted[0] += 1
            if counted[0] == at:
                raise KeyboardInterrupt

        monkeypatch.setattr(Progress, 'update', stopping)

    return interrupt


@pytest.mark.slow
@pytest.mark.parametrize('pretrained', [False, True])
def test_ctrl_c_and_resume_end_where_the_whole_run_does(
    pretrained, there, weights, tmp_path, capsys, interrupt, undrawn
):
    args = [*KNOWN, '--recipe', 'paper', '--weights', weights] if pretrained else SMALL
    args = [*DATA, *args, '--epochs', 2, '--ema', '--no-check', '--out']
    assert exit_code(fixmatch_train, *args, tmp_path / 'whole') == 0
    interrupt(8 if pretrained else 5)
    assert exit_code(fixmatch_train, *args, tmp_path / 'cut') == 130
    interrupt()
    err = capsys.readouterr().err
    assert 'All finished epochs are saved' in err and '--resume' in err and 'Traceback' not in err
    assert not (tmp_path / 'cut' / 'learner.pkl').exists()
    assert len(pd.read_csv(tmp_path / 'cut' / 'history.csv')) == 1 + pretrained
    assert exit_code(fixmatch_train, *args, tmp_path / 'cut', '--resume') == 0
    same_runs(tmp_path / 'whole', tmp_path / 'cut')
    assert pd.read_csv(tmp_path / 'cut' / 'history.csv').epoch.tolist() == list(range(2 + pretrained))


@pytest.mark.slow
def test_a_tuned_run_resumes(there, weights, tuned, tmp_path, capsys, interrupt, undrawn):
    "Stopped on labels alone, with the pool, and in its twin"
    args = [*DATA, *KNOWN, '--weights', weights, '--epochs', 3, '--compare', '--no-check', '--out', tmp_path / 'cut']
    for at, table, done in (5, 'history.csv', 1), (5, 'history.csv', 2), (3 + 5, 'supervised_history.csv', 1):
        interrupt(at)  # counted anew, from the end of the last whole epoch
        assert exit_code(fixmatch_train, *args, *(['--resume'] if Path(args[-1]).exists() else [])) == 130
        assert len(pd.read_csv(tmp_path / 'cut' / table)) == done
    interrupt()
    assert exit_code(fixmatch_train, *args, '--resume') == 0
    same_runs(tuned[0], tmp_path / 'cut')
    same_histories(tuned[0], tmp_path / 'cut', 'supervised_history.csv')
    assert verdict(capsys.readouterr().out) == verdict(tuned[1])


@pytest.mark.slow
def test_ctrl_c_in_the_first_epoch(there, tmp_path, capsys, interrupt, undrawn):
    args = '--epochs', 1, '--no-check', '--out', tmp_path / 'cut'
    interrupt(2)
    assert train(*args) == 130
    interrupt()
    assert 'No epoch was finished' in capsys.readouterr().err
    assert train(*args, '--resume') == 0


OTHER = [('--epochs', 3), ('--size', 40), ('--policy', 'fixed')]


@pytest.mark.slow
@pytest.mark.parametrize('option,value', OTHER)
def test_another_run_is_not_resumed(option, value, run, there, capsys):
    before = (run / 'learner.pkl').read_bytes()
    assert train('--policy', 'FreeMatch', '--epochs', 2, '--out', 'run', '--resume', '--no-check', option, value) == 2
    err = capsys.readouterr().err.strip()
    assert f'holds a run with another {option}' in err and '\n' not in err
    assert (run / 'learner.pkl').read_bytes() == before


OTHER_TUNED = [
    (('--recipe', 'paper', '--policy', 'aligned'), '--recipe (finetune there, paper here)'),
    (('--weights', 'copied.safetensors'), '--weights'),
]


@pytest.mark.slow
@pytest.mark.parametrize('other,text', OTHER_TUNED)
def test_another_tuned_run_is_not_resumed(other, text, tuned, there, weights, capsys):
    shutil.copy(weights, 'copied.safetensors')
    args = [*DATA, *KNOWN, '--weights', weights, '--epochs', 3, '--out', 'tuned', '--resume', '--no-check', *other]
    assert exit_code(fixmatch_train, *args) == 2
    err = capsys.readouterr().err.strip()
    assert f'holds a run with another {text}' in err and '\n' not in err


@pytest.mark.slow
def test_a_run_of_a_version_without_recipes_is_resumed(there, tmp_path, capsys, undrawn):
    args = ('--epochs', 1, '--no-check', '--out', tmp_path / 'old')
    assert train(*args) == 0
    file = tmp_path / 'old' / 'models' / 'options.json'
    noted = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in noted.items() if k not in ('recipe', 'weights')}))
    assert train(*args, '--resume') == 0
    assert 'nothing is left to train' in capsys.readouterr().out


@pytest.mark.slow
def test_a_checkpoint_of_other_images_is_not_resumed(run, there, capsys):
    shutil.copytree('labeled', 'fewer')
    next(Path('fewer/1').iterdir()).unlink()
    data = ['--labeled', 'fewer', '--unlabeled', 'unlabeled']
    before = (run / 'learner.pkl').read_bytes()
    assert train('--policy', 'FreeMatch', '--epochs', 2, '--out', 'run', '--resume', '--no-check', data=data) == 2
    assert (run / 'learner.pkl').read_bytes() == before
    err = capsys.readouterr().err
    assert 'checkpoint of another run' in err and 'give another --out' in err


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='signals are others there')
def test_a_whole_process_stops_at_ctrl_c(there, tmp_path):
    code = 'from fixmatch_fastai.cli.train import fixmatch_train; fixmatch_train()'
    args = [*DATA, *SMALL, '--workers', '1', '--epochs', '500', '--no-check', '--out', str(tmp_path / 'cut')]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, '-c', code, *args], start_new_session=True, **pipes)
    for line in process.stdout:
        if line.startswith('epoch 1'):  # the checkpoint of the one before is written
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: workers get it too
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and '--resume to go on' in err and 'Traceback' not in err
    assert (tmp_path / 'cut' / 'models' / 'fixmatch.pth').exists()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['train', 'predict'])
def test_a_command_brings_all_it_needs(name, run, there, tmp_path):
    "In a process of its own: what tests have imported would hide what a command lacks"
    args = {
        'train': [*DATA, *SMALL, '--steps', 1, '--epochs', 1, '--no-check', '--out', tmp_path / 'run'],
        'predict': ['--learner', run / 'learner.pkl', 'unlabeled', '--workers', 0, '--out', tmp_path / 'table.csv'],
    }
    code = f'from fixmatch_fastai.cli.{name} import fixmatch_{name}; fixmatch_{name}()'
    command = [sys.executable, '-c', code, *map(str, args[name])]
    res = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert res.returncode == 0, res.stderr
    if name == 'train':
        assert (tmp_path / 'run' / 'report.html').exists()
    else:
        assert len((tmp_path / 'table.csv').read_text().splitlines()) > 1
