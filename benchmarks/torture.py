"""Try to lose work: kill -9, Ctrl-C, damaged and hostile files, dead workers, two processes in one folder, full disks.

Each trial does one such thing at random to a small run, in a process of its own. What is random comes from the seed,
the trial's name and its number, so that one that failed can be tried again; signals come after the same time, but a
machine may have got further by then.

make torture                                        all kinds in turn, for eight minutes
make torture ARGS="--only kill flip-weights"        those whose names begin so
make torture ARGS="--only kill-table --trial 17"    one of them, and what it printed
"""

import argparse
import json
import multiprocessing
import os
import pickle
import platform
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

warnings.filterwarnings('ignore')  # before fastai is imported

import fastai
import matplotlib
import numpy as np
import pandas as pd
import psutil
import torch
from fastai.vision import all as vision
from PIL import Image
from safetensors.torch import load_file, save_file

from fixmatch_fastai import all as ours
from fixmatch_fastai.checkpoint import SaveFixMatch
from fixmatch_fastai.console import CommandError
from fixmatch_fastai.core import replacing
from fixmatch_fastai.experiment.config import config_yaml, flat_values, read_config, resolved
from fixmatch_fastai.experiment.run import Run, load_images, run
from fixmatch_fastai.self_training import compare_supervised, pseudo_label, read_pseudo_labels, with_pseudo_labels

EPOCHS, STEPS = 3, 3
SHARED = tempfile.TemporaryDirectory()
LIMIT = 120  # seconds, after which a trial hangs
fork = multiprocessing.get_context('fork')  # fastai is imported already


class Failure(AssertionError):
    "Something is lost, or false"


def check(right, sentence):
    if not right:
        raise Failure(sentence)


def check_same(found, expected, what):
    "Bit for bit; but batches of other sizes round in other ways, which tables may show"
    try:
        if isinstance(expected, pd.DataFrame):
            pd.testing.assert_frame_equal(found, expected, rtol=1e-5)
        else:
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    except AssertionError as e:
        raise Failure(f'{what} is not what it should be: {" ".join(str(e).split())[:200]}') from e


def check_error(error, kinds, what):
    "It has one of these types, and is one sentence to whoever called"
    text = str(error).split('\n\t')[-1].strip()  # behind fastai's own words
    check(type(error) in kinds and text and '\n' not in text, f'{what} became {type(error).__name__}: {text[:300]!r}')
    check(type(error) not in REFUSALS or text[-1] in '.?', f'{what} became no sentence: {text[:300]!r}')


REFUSALS = ValueError, TypeError, CommandError


def refused_or(task, *args):
    "What it returns, or `None` where it refuses in one sentence"
    try:
        return task(*args)
    except Exception as e:
        traceback.print_exc()
        check_error(e, REFUSALS, 'a refusal')


def pick(rng, options):
    return options[rng.integers(len(options))]


def write(file, data):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


# --- tasks: each writes in a folder, and called again it goes on -----------------------------------------------------

RUNS = [  # policy, other callbacks, a teacher
    lambda: (ours.FlexMatch(0.2), [], {}),
    lambda: (ours.FreeMatch(decay=0.9), [ours.ModelEMA(half_life=3)], {}),
    lambda: (ours.FlexMatch(0.2), [], dict(teacher=ours.ModelEMA(half_life=3), warmup=0.3)),
]


@cache
def digits():
    "Labelled images, a pool, images to validate on, and many to label"
    labeled, rest = ours.split_labeled(vision.get_image_files(ours.digits_path()).sorted(), vision.parent_label, 20)
    pool, rest = ours.split_labeled(rest, vision.parent_label, 60)
    return labeled, pool, *ours.split_labeled(rest, vision.parent_label, 20)


def as_rows(files):
    return pd.DataFrame(dict(file=[*map(str, files)], label=[*map(vision.parent_label, files)]))


def plain_learner(path='.', seed=0, workers=0, rows=False, files=None):
    "Without FixMatch, of digits as files or as rows of a table, of which the last 20 are validated on"
    files = files or [*digits()[0], *digits()[2]]
    x, y = (vision.ColReader(0), vision.ColReader(1)) if rows else (None, vision.parent_label)
    tfm, split = ours.WeakTransform(ours.weak_augment(flip=False)), vision.IndexSplitter([*range(-20, 0)])
    vision.set_seed(seed)
    blocks = vision.ImageBlock(vision.PILImageBW), vision.CategoryBlock
    block = vision.DataBlock(blocks, get_x=x, get_y=y, splitter=split, item_tfms=tfm)
    dls = block.dataloaders(as_rows(files) if rows else files, bs=4, val_bs=20, num_workers=workers)
    body = vision.ConvLayer(1, 8, stride=2), vision.nn.AdaptiveAvgPool2d(4), vision.nn.Flatten()
    net = vision.nn.Sequential(*body, vision.nn.Linear(128, dls.c))
    return vision.Learner(dls.repeat_train(STEPS), net, metrics=vision.accuracy, path=path)


def learner(path='.', number=0, seed=0, workers=0):
    learn, (policy, cbs, kwargs) = plain_learner(path, seed, workers), RUNS[number]()
    return learn.add_cbs([ours.FixMatch(learn.dls.unlabeled_dl(digits()[1], mu=2), policy=policy, **kwargs), *cbs])


def fit(learn, cbs=()):
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(EPOCHS, 1e-2, cbs=cbs)
    return learn


def weights(model):
    "A number that tells them apart"
    return zlib.crc32(b''.join(p.detach().numpy().tobytes() for p in model.parameters()))


def state(learn):
    "What a run has come to"
    parts = dict(model=learn.model, optimizer=learn.opt, policy=learn.fix_match.policy)
    parts |= dict(average=learn.model_ema) if hasattr(learn, 'model_ema') else {}
    rows, history = [*map(list, learn.recorder.values)], torch.tensor(learn.fix_match.history.to_numpy('float64'))
    return {k: {**o.state_dict()} for k, o in parts.items()} | dict(rows=rows, history=history)


def train(folder, number, workers=0, cbs=()):
    return state(fit(learner(folder, number, workers=workers), [SaveFixMatch('a', resume=True), *cbs]))


class Weights(vision.Callback):
    "Those before and after each step, and the averages that are validated"

    order, run_valid = 100, False

    def before_fit(self):
        self.seen = {weights(self.model)}

    def after_batch(self):
        average = getattr(self.learn, 'model_ema', None)
        self.seen |= {weights(self.model)} | ({weights(average.ema.module)} if average else set())


def weights_seen(folder, number, workers):
    fit(learner(folder, number, workers=workers), seen := Weights())
    return seen.seen


def stop():
    raise KeyboardInterrupt


class StopEarly(vision.Callback):
    def before_epoch(self):
        if self.epoch == EPOCHS - 1:
            stop()


def train_half(folder, number):
    with suppress(KeyboardInterrupt):
        train(folder, number, cbs=[StopEarly()])


def label_with(learn, items, out=None):
    with learn.no_bar():
        return pseudo_label(learn, items, soft=True, bs=16, out=out)


def label(folder, workers=0, seed=1):
    "The table as it is read back"
    label_with(learner(seed=seed, workers=workers), digits()[3][:400], folder / 'a.csv')
    return read_pseudo_labels(folder / 'a.csv')


def label_half(learn, items, out, n_batches=10):
    "Interrupted before one of its batches"
    seen = []
    hook = learn.model.register_forward_pre_hook(lambda *args: seen.append(0) if len(seen) < n_batches else stop())
    with suppress(KeyboardInterrupt):
        label_with(learn, items, out)
    hook.remove()


def compare(folder, seeds=(0, 1), workers=0):
    "Runs of both arms, without the seconds that they took"
    pool, make = lambda dls: dls.unlabeled_dl(digits()[1], mu=2), lambda seed: plain_learner(folder, seed, workers)
    twin = compare_supervised(make, pool, seeds=[*seeds], fit=fit, out=folder / 'a.json', progress=False)
    return twin.runs.query('seed in @seeds').drop(columns='seconds').sort_values(['seed', 'method'], ignore_index=True)


def config(folder, seed=0):
    settings = f'data=digits n_labels=20 network=small_cnn steps=4 eval_every=2 bs=4 mu=2 workers=0 seed={seed}'
    return read_config([*settings.split(), 'device=cpu', 'name=a', f'out={folder}'])


@cache
def few_images():
    images = load_images(resolved(config('.')))
    return images._replace(train=images.train[::5], test=images.test[::20])


def experiment(folder, seed=0):
    "History and result, without the time that they took"
    row = run(config(folder, seed), few_images())
    history = pd.read_csv(folder / f'a/seed_{seed}/history.csv').drop(columns='time')
    return history.assign(**{f'result {k}': v for k, v in row.items() if k != 'minutes'})


@cache
def whole(task, *args):
    "A task that nothing stops: its value, its seconds, and its files; found once, for all trials"
    known = Path(SHARED.name) / f'{task.__name__}{args}'
    if known.exists():
        return pickle.loads(known.read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        start, value = time.time(), task(Path(folder), *args)
        files = {str(o.relative_to(folder)): o.read_bytes() for o in Path(folder).rglob('*') if o.is_file()}
    found = SimpleNamespace(value=value, seconds=time.time() - start, files=files)
    with replacing(known) as tmp:
        tmp.write_bytes(pickle.dumps(found))
    return found


def check_goes_on(task, folder, *args):
    check_same(task(folder, *args), whole(task, *args).value, f'what {task.__name__} came to')


# --- kill -9, Ctrl-C, dead workers, two processes --------------------------------------------------------------------


def args_of(rng, task):
    return (int(rng.integers(len(RUNS))),) if task is train else ()


def kill(task, rng, folder):
    "At any moment, or while it writes a file, one to three times"
    args = args_of(rng, task)
    for _ in range(rng.integers(1, 4)):
        end, aimed = time.time() + rng.uniform(0, 1.1 * whole(task, *args).seconds), rng.random() < 0.5
        process = fork.Process(target=task, args=(folder, *args))
        process.start()
        while time.time() < end and process.is_alive() and not (aimed and [*folder.rglob('*.tmp*')]):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.003))
        process.kill()
        process.join()
    check_goes_on(task, folder, *args)


@contextmanager
def signal_soon(rng, seconds, send):
    "`send()` within so many seconds, from another thread; the errors that come of it are kept, as notebooks do"
    timer, errors = threading.Timer(rng.uniform(0, seconds), send), []
    timer.start()
    try:
        try:
            yield errors
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            timer.cancel()
            timer.join()
            time.sleep(0.1)  # a Ctrl-C that Python would drop comes again
    except (Exception, KeyboardInterrupt) as e:
        errors.append(e)
        traceback.print_exc()
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def ctrl_c(rng, seconds):
    "To this process, as a notebook's button sends it; or to its workers too, as a terminal does"
    send = pick(rng, [partial(os.kill, os.getpid()), partial(os.killpg, 0)])
    with signal_soon(rng, seconds, partial(send, signal.SIGINT)) as errors:
        yield
    kinds = [f'{type(e).__name__}: {str(e)[:200]!r}' for e in errors if not isinstance(e, KeyboardInterrupt)]
    check(not kinds, f'Ctrl-C became {kinds}')
    check_none_left()


def children():
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


def check_none_left():
    end = time.time() + 10
    while children() and time.time() < end:
        time.sleep(0.05)
    check(not children(), f'{len(children())} worker processes are left')


def stop_training(rng, folder):
    number, workers = pick(rng, [(0, 0), (1, 0), (2, 0), (1, 1)])
    known = whole(weights_seen, number, workers)  # first: a learner's random numbers begin when it is made
    learn = learner(folder, number, workers=workers)
    with ctrl_c(rng, known.seconds):
        fit(learn, SaveFixMatch('a'))
    check(weights(learn.model) in known.value, 'the weights are those of no whole step')
    resumes = (folder / 'models/a.pth').exists()
    learn.remove_cbs(learn._grab_cbs(SaveFixMatch))  # where it came while fastai took it off
    fit(learn, SaveFixMatch('a', resume=True))
    if resumes and workers == 0:  # with workers a resumed run is not promised bit for bit
        check_same(state(learn), whole(train, number).value, 'the resumed run')
    check(type(learn.loss_func) is vision.CrossEntropyLossFlat, "the loss is not the learner's own")
    check_none_left()


def stop_task(task, workers, rng, folder):
    args = pick(rng, [args_of(rng, task), workers])
    with ctrl_c(rng, whole(task, *args).seconds):
        task(folder, *args)
    check_goes_on(task, folder, *args)


def kill_worker(task, args, rng, folder):
    seconds = whole(task, *args).seconds

    def kill_one():
        end = time.time() + seconds
        while not (found := children()) and time.time() < end:
            time.sleep(0.001)
        if found:
            pick(rng, found).kill()

    with signal_soon(rng, seconds / 2, kill_one) as errors:
        task(folder, *args)
    for e in errors:
        check_error(e, [RuntimeError], 'a dead worker')
    check_none_left()
    check_goes_on(task, folder, *args) if task is label else fit(learner(folder, workers=1))
    check_none_left()


def two_processes(task, rng, folder):
    "Each comes to what it should, or is refused; called again they are whole"
    calls = {compare: [((0,),), ((1,),)], experiment: pick(rng, [[(), ()], [(), (1,)]])}
    calls = calls.get(task, [args_of(rng, task)] * 2)
    expected = [whole(task, *args) for args in calls]
    with ProcessPoolExecutor(2, fork) as pool:
        futures = []
        for args in calls:
            futures.append(pool.submit(task, folder, *args))
            time.sleep(expected[0].seconds * rng.random() * pick(rng, [0, 1]))
    for o, known in zip(futures, expected):
        if error := o.exception():
            check_error(error, REFUSALS, 'a refusal')
        else:
            check_same(o.result(), known.value, 'what one of two processes came to')
    ended = [o for o in futures if not o.exception()]
    check(ended, 'both processes were refused')
    if task is compare:
        n = len(json.loads((folder / 'a.json').read_text()))
        check(n == 3 * len(ended), f'{n} of {3 * len(ended)} runs are in the file')
    for args in calls:
        check_goes_on(task, folder, *args)


def other_images(rng, folder):
    forms = {
        'files': list,
        'arrays': lambda files: [np.array(Image.open(o)) for o in files],
        'rows': as_rows,
        'pixels': lambda files: [shutil.copy(o, folder / f'{i}.png') for i, o in enumerate(files)],  # of the same names
    }
    form, out = pick(rng, [*forms]), folder / 'a.csv'
    learn = plain_learner(seed=1, rows=form == 'rows')
    label_half(learn, forms[form](digits()[3][:96]), out, rng.integers(6))
    items = forms[form](digits()[3][96:192])
    check_same(label_with(learn, items, out), label_with(learn, items), f'a table of other {form}')


# --- damaged and hostile files ---------------------------------------------------------------------------------------


TEXTS = '.part', '.csv', '.json', '.yaml'  # and files of a `SaveFixMatch` and of weights have trials of their own


def damage(rng, file):
    "Some bits are turned, or it is cut short, blank in part, or has more or fewer bytes"
    data = bytearray(file.read_bytes() or b'0')
    i, how = int(rng.integers(len(data))), pick(rng, ['bits', 'bits', 'short', 'blank', 'more', 'less'])
    part = slice(i, None if how == 'short' else i + int(rng.integers(1, 200)))
    if how == 'bits':
        for k in rng.integers(len(data), size=rng.integers(1, 4)):
            data[k] ^= 1 << int(rng.integers(8))
    else:
        data[part] = dict(blank=bytes(len(data[part])), more=rng.bytes(50) + data[part]).get(how, b'')
    write(file, bytes(data))


def flip(task, read, rng, folder):
    "A file that `task` left: what `read` returns is what it was, or it is refused"
    for name, data in whole(task).files.items():
        write(folder / name, data)
    damage(rng, pick(rng, [o for o in sorted(folder.rglob('*')) if o.suffix in TEXTS]))
    found = refused_or(read, folder)
    if found is not None:
        check_same(found, whole(read).value, f'what {read.__name__} made of it')


def label_part(folder):
    label_half(learner(seed=1), digits()[3][:400], folder / 'a.csv')


def use_table(folder):
    with_pseudo_labels(plain_learner().dls, read_pseudo_labels(folder / 'a.csv'))


def train_experiment(folder):
    Run(config(folder), few_images()).fit()


def rerun(folder):
    run(config(folder), few_images())


def write_config(folder):
    write(folder / 'a.yaml', config_yaml(config(folder)).encode())


def use_config(folder):
    resolved(read_config(file=folder / 'a.yaml'))


HOSTILE = [None, True, -1, 1.5, 10**12, 'x', '../../x', [], {}, [1], {'a': 1}, float('nan'), float('inf')]
TENSORS = [torch.zeros(3), torch.full((2, 2), float('nan')), torch.tensor(-1), torch.tensor([True])]
KEYS = ['../../x', 'learn', 'model', 'order', '__class__', 'after_step', 1, None]


def craft(rng, file):
    "Something in a checkpoint is replaced, left out or added"
    found = torch.load(file, weights_only=True)
    o = found if rng.random() < 0.5 else found[pick(rng, ['cbs', 'fixmatch', 'opt', 'record', 'random'])]
    k = pick(rng, [*o])
    while isinstance(o[k], (dict, list)) and len(o[k]) and rng.random() < 0.8:
        o = o[k]
        k = pick(rng, [*o] if isinstance(o, dict) else range(len(o)))
    how = pick(rng, ['replace', 'replace', 'drop', 'add'])
    if how == 'drop':
        del o[k]
    else:
        o[pick(rng, KEYS) if how == 'add' and isinstance(o, dict) else k] = pick(rng, HOSTILE + TENSORS)
    torch.save(found, file)


def bad_checkpoint(spoil, rng, folder):
    number, file = int(rng.integers(len(RUNS))), folder / 'models/a.pth'
    write(file, whole(train_half, number).files['models/a.pth'])
    spoil(rng, file)
    learn, other = learner(folder, number, seed=5), fit(learner(folder, number), SaveFixMatch('b'))
    before, attributes = weights(learn.model), {o.name: {*vars(o)} for o in other.cbs}
    found = refused_or(fit, learn, SaveFixMatch('a', resume=True))
    more = {(o.name, k) for o in learn.cbs for k in {*vars(o)} - attributes[o.name]}
    check(not more, f'a checkpoint gave callbacks the attributes {sorted(map(str, more))}')
    check({o.name for o in folder.rglob('*')} <= {'models', 'a.pth', 'b.pth'}, 'files were written elsewhere')
    check(type(learn.loss_func) is vision.CrossEntropyLossFlat, "the loss is not the learner's own")
    if found is None:
        check(weights(learn.model) == before, 'it was refused, but the weights have changed')
        check(len(fit(learn).fix_match.history) == EPOCHS * STEPS, 'a fit after it was refused is not whole')
    elif spoil is damage:
        check_same(state(learn), whole(train, number).value, 'the resumed run')


def recast(rng, file):
    "Weights of another type, shape or name, or beside other text"
    found, text = load_file(file), pick(rng, ['[', '3', '"x"', 'null', '{"a": 1}', '', '[[1]]'])
    k, how = pick(rng, [*found]), pick(rng, ['type', 'shape', 'name', 'none', 'text'])
    o = found.pop(k)
    if how == 'type':
        o = o.to(pick(rng, [torch.int64, torch.bool, torch.float64, torch.complex64]))
    if how == 'shape':
        o = torch.zeros(pick(rng, [(), (0,), (1,), (2, 3)]))
    save_file(found if how == 'none' else {**found, '../../x' if how == 'name' else k: o}, file, {'vocab': text})


def bad_weights(spoil, rng, folder):
    saved, learn = plain_learner(folder, seed=1), plain_learner(folder, seed=2)
    file, before = saved.save_weights('a'), weights(learn.model)
    spoil(rng, file)
    loaded = refused_or(learn.load_weights, 'a', spoil is damage or bool(rng.integers(2)))
    if not loaded:
        check(weights(learn.model) == before, 'they were refused, but the weights have changed')
    elif spoil is damage:
        check(weights(learn.model) == weights(saved.model), 'they are not the weights that were saved')


def hostile_config(rng, folder):
    value = pick(rng, HOSTILE)
    for o in reversed(pick(rng, [*flat_values(config(folder))]).split('.')):
        value = {o: value}
    write(folder / 'a.yaml', json.dumps(value).encode())
    refused_or(use_config, folder)


NAMES = ['=1+1', '+1', '-1', '@x', 'a,b', 'a"b', "a'b", 'a\nb', 'a\rb', ' a ', 'NA', 'nan', '1e5', '007', '#', 'é']
NAMES += ['\udce9', '\\u005c', '\\udce9']


def hostile_names(rng, folder):
    os.chdir(folder)  # so that files in tables begin with what their names begin with
    classes = [NAMES[i] for i in rng.choice(len(NAMES), 3, replace=False)]
    for i, file in enumerate(digits()[0] * 3):
        write(Path('labeled') / classes[i % 3] / f'{i:02}.png', file.read_bytes())
    pool = [Path(f'{o}.png') for o in NAMES]
    for name, file in zip(pool, digits()[1]):
        write(name, file.read_bytes())
    learn = plain_learner(files=vision.get_image_files('labeled').sorted())
    table = label_with(learn, pool, Path('a.csv'))
    read = read_pseudo_labels('a.csv')
    check_same(read, table, 'the table that was read')
    check(read.file.tolist() == [*map(str, pool)] and {*read.predicted} <= {*classes}, 'the table has other names')
    with_pseudo_labels(learn.dls, read).train.one_batch()


def huge(png):
    "Its header promises 10^10 pixels"
    header = png[12:16] + struct.pack('>II', 100_000, 100_000) + png[24:29]
    return png[:12] + header + struct.pack('>I', zlib.crc32(header)) + png[33:]


def hostile_images(rng, folder):
    "Good ones among them get the labels that they get alone, and a fit goes on without the others, and names them"
    good, end = digits()[1][:40], int(rng.integers(1, 100))
    png = good[0].read_bytes()
    bad = {'empty.png': b'', 'cut.png': png[:end], 'text.png': b'<html>', 'huge.png': huge(png), '\udce9.png': b'x'}
    bad |= {'text.jpg': b'=1+1', 'zip.jpeg': b'PK\x03\x04' + rng.bytes(99), 'a.gif': b'GIF89a' + b'\xff' * 99}
    for name, data in bad.items():
        write(folder / name, data)
    items = [*good, *(folder / o for o in bad)]
    items, learn = [items[i] for i in rng.permutation(len(items))], learner(folder, workers=pick(rng, [0, 0, 1]))
    tables = [label_with(learn, o).sort_values('file', ignore_index=True) for o in (items, good)]
    check_same(*tables, 'the table of the good images')
    learn.fix_match.unlabeled_dl = learn.dls.unlabeled_dl(items, mu=3)
    named = {Path(o).name for o in fit(learn).fix_match.unlabeled_dl.damaged.item}
    check(named and named <= {*bad}, f'the damaged images are said to be {sorted(map(ascii, named))}')


@contextmanager
def full_disk(size):
    "No file gets more than `size` bytes"
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))
    error = None
    try:
        yield
    except Exception as e:
        error = e
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    if error is not None:
        check_error(error, [OSError, *REFUSALS], 'a full disk')


def disk_full(rng, folder):
    "What was written before stays as it was; afterwards it is written again"
    seeds = iter(range(3))
    tasks = {
        'models/a.pth': lambda: fit(learner(folder, seed=next(seeds)), SaveFixMatch('a')),
        'models/a.safetensors': lambda: plain_learner(folder, next(seeds)).save_weights('a'),
        'a.csv': lambda: label(folder, seed=next(seeds)),
        'a.json': lambda: compare(folder, (next(seeds),)),
    }
    name = pick(rng, [*tasks])
    tasks[name]()
    before = (folder / name).read_bytes()
    with full_disk(int(rng.integers(len(before) // 2))):
        tasks[name]()
    check((folder / name).read_bytes() == before, 'the file from before is lost')
    check(not [*folder.rglob('*.tmp*')], 'part of a file is left')
    tasks[name]()
    check((folder / name).read_bytes() != before, 'nothing was written afterwards')


TRIALS = {  # share of the time, what is tried and must come of it, and how
    'kill-training': (4, 'kill -9 in a training: resumed, it is the whole run bit for bit', partial(kill, train)),
    'kill-table': (2, 'kill -9 in `pseudo_label`: called again, it makes the whole table', partial(kill, label)),
    'kill-comparison': (1, 'kill -9 in `compare_supervised`: called again, all runs', partial(kill, compare)),
    'kill-experiment': (1, 'kill -9 in an experiment: run again, the whole history', partial(kill, experiment)),
    'stop-training': (4, 'Ctrl-C in a fit: no half step, no worker left, resumed bit for bit', stop_training),
    'stop-table': (1, 'Ctrl-C in `pseudo_label`: no worker left, it goes on', partial(stop_task, label, [1])),
    'stop-comparison': (1, 'Ctrl-C in `compare_supervised`: the same', partial(stop_task, compare, [(0,), 1])),
    'worker-training': (2, 'kill -9 of a worker of a fit: one error, none left', partial(kill_worker, train, [0, 1])),
    'worker-table': (1, 'kill -9 of a worker of `pseudo_label`: the same', partial(kill_worker, label, [1])),
    'two-trainings': (2, 'Two processes resume one run in one folder', partial(two_processes, train)),
    'two-tables': (1, 'Two processes write one table', partial(two_processes, label)),
    'two-comparisons': (1, 'Two processes write one comparison, each a seed of it', partial(two_processes, compare)),
    'two-experiments': (1, 'Two processes run one experiment, or two seeds of it', partial(two_processes, experiment)),
    'other-images': (1, "An interrupted table, then other images: none of the first's labels", other_images),
    'flip-checkpoint': (2, 'A damaged checkpoint: read bit for bit, or refused', partial(bad_checkpoint, damage)),
    'flip-weights': (1, 'Damaged weights: read bit for bit, or refused', partial(bad_weights, damage)),
    'flip-part': (1, 'A damaged `.part` of a table: the whole table, or refused', partial(flip, label_part, label)),
    'flip-comparison': (1, "A damaged comparison's file: its runs, or refused", partial(flip, compare, compare)),
    'flip-table': (1, 'A damaged table: used, or refused', partial(flip, label, use_table)),
    'flip-config': (1, 'A damaged YAML file: used, or refused', partial(flip, write_config, use_config)),
    'flip-experiment': (1, 'A damaged file of an experiment that was stopped', partial(flip, train_experiment, rerun)),
    'flip-result': (1, 'A damaged file of a finished experiment', partial(flip, experiment, rerun)),
    'craft-checkpoint': (2, 'A checkpoint with wrong, missing or foreign values', partial(bad_checkpoint, craft)),
    'craft-weights': (1, 'Weights of other types, shapes, names, and other text', partial(bad_weights, recast)),
    'craft-config': (1, 'YAML with values of any type', hostile_config),
    'craft-names': (1, 'Names that tables and spreadsheets take for something else', hostile_names),
    'craft-images': (1, 'Empty, cut, huge and misnamed images among good ones', hostile_images),
    'disk-full': (2, 'A full disk: what was there stays, and can be written again', disk_full),
}


# --- the runner ------------------------------------------------------------------------------------------------------


def play(name, number, seed, folder):
    "One trial, in this process; `folder/why` says why it failed"
    os.setsid()
    log = (folder / 'log').open('w', buffering=1, errors='backslashreplace')
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        TRIALS[name][2](np.random.default_rng([seed, zlib.crc32(name.encode()), number]), folder / 'files')
        why = ''
    except BaseException as e:
        traceback.print_exc()
        why = str(e) if isinstance(e, Failure) else f'{type(e).__name__}: {" ".join(str(e).split())[:300]}'
    (folder / 'why').write_text(why, errors='backslashreplace')
    for o in children():
        o.kill()
    os._exit(0)


class Trial:
    "One that has begun"

    def __init__(self, name, number, seed):
        self.name, self.number, self.start = name, number, time.time()
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / 'files').mkdir()
        self.process = fork.Process(target=play, args=(name, number, seed, self.folder))
        self.process.start()

    def seconds(self):
        return time.time() - self.start

    def has_ended(self):
        return not self.process.is_alive() or self.seconds() > LIMIT

    def why(self):
        "Why it failed, or nothing"
        if self.process.is_alive():
            return f'it was not done after {LIMIT} seconds'
        file = self.folder / 'why'
        return file.read_text() if file.exists() else f'it ended with {self.process.exitcode}'

    def log(self):
        "The end of what it printed"
        return (self.folder / 'log').read_text(errors='replace')[-3000:]

    def clear(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        shutil.rmtree(self.folder)


def torture(names, minutes=8, seed=0, jobs=2, each=10**6, first=0):
    "Trials in turn, by their shares, for so long or `each` times; how many there were, and failures, by name"
    spent, counts, failures = ({o: start for o in names} for start in (0, 0, ()))
    running, end, printed = [], time.time() + 60 * minutes, time.time()
    while True:
        todo = [o for o in names if counts[o] < each and time.time() < end]
        if todo and len(running) < jobs:
            name = min(todo, key=lambda o: spent[o] / TRIALS[o][0])
            running.append(Trial(name, first + counts[name], seed))
            counts[name] += 1
            spent[name] += 0.1  # until it is known
        elif not running:
            return {o: (counts[o], failures[o]) for o in names}
        for o in [o for o in running if o.has_ended()]:
            running.remove(o)
            spent[o.name] += o.seconds()
            if why := o.why():
                failures[o.name] += (why,)
                again = f'--only {o.name} --trial {o.number} --seed {seed}'
                print(f'{o.name} {o.number}: {why}\n  again: {again}\n{o.log()}', flush=True)
            o.clear()
        if time.time() > printed + 10:
            printed, n = time.time(), sum(counts.values())
            failed, left = sum(map(len, failures.values())), max(0, end - printed)
            print(f'{n} trials, {failed} failed, {left:.0f} seconds left', flush=True)
        time.sleep(0.01)


ABOUT = """# Nothing lost, nothing false

`make torture` tries to lose work, and to have what is false taken for true. Each trial does one bad thing at random to
a small run, in a process of its own, and fails where something else comes of it than should. What is *refused* is
refused in one sentence, and changes nothing.

| trial | what is tried | how often | failures |
| --- | --- | --- | --- |
"""


def page(counts, settings):
    rows = [(f'`{o}`', TRIALS[o][1], n, len(failed)) for o, (n, failed) in counts.items()]
    rows.append(('all', '', sum(o[2] for o in rows), sum(o[3] for o in rows)))
    info = Path('/proc/cpuinfo')
    cpu = re.search(r'model name\s*:\s*(.*)', info.read_text())[1] if info.exists() else platform.processor()
    versions = f'Python {platform.python_version()}, torch {torch.__version__}, fastai {fastai.__version__}'
    return (
        ABOUT + ''.join('| {} | {} | {:,} | {:,} |\n'.format(*o) for o in rows) + f'\n*{settings}; {cpu}; {versions}*\n'
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=8)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--jobs', type=int, default=2, help='trials at the same time')
    parser.add_argument('--only', nargs='+', default=[''], help='beginnings of names of trials')
    parser.add_argument('--each', type=int, default=10**6, help='how many trials of each name at most')
    parser.add_argument('--trial', type=int, help='the number of one to try again')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent, help='folder of torture.md')
    args = parser.parse_args(argv)
    names = [o for o in TRIALS if o.startswith(tuple(args.only))]
    once = args.trial is not None
    if not names or once and len(names) > 1:
        parser.error(f'--only is {"one" if once else "some"} of {", ".join(TRIALS)}')
    matplotlib.use('agg')
    torch.set_num_threads(1)
    each, first = (1, args.trial) if once else (args.each, 0)
    counts = torture(names, args.minutes, args.seed, args.jobs, each, first)
    text = page(counts, f'Seed {args.seed}, {args.minutes:g} minutes, {args.jobs} trials at a time')
    print(text)
    if len(names) == len(TRIALS) and not once:
        (args.out / 'torture.md').write_text(text, encoding='utf-8')
    return int(any(failed for _, failed in counts.values()))


if __name__ == '__main__':
    sys.exit(main())
