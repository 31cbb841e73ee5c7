"""The unlabelled pool: streams, files that can't be opened, the cache, views made on the device.

More damaged files: `FUZZ_FILES=20000 python -m pytest tests/test_data.py -k bytes`"""

import io
import multiprocessing
import os
import pickle
import shutil
import warnings
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import Seen, quiet_fit, tiny_net
from fastai.vision.all import (
    FlipItem,
    ImageDataLoaders,
    Learner,
    PILImage,
    PILImageBW,
    Resize,
    Transform,
    first,
    parent_label,
    set_seed,
)
from PIL import Image

from fixmatch_fastai.all import (
    FixMatch,
    FixMatchBatchTransform,
    FixMatchTransform,
    FlexMatch,
    UnlabeledDL,
    fixmatch_check,
    weak_augment,
)

WEAK = weak_augment(flip=False)


def take(loader, n, dls=None):
    "The first `n` batches of a stream"
    stream = loader.stream(dls)
    try:
        return [next(stream) for _ in range(n)]
    finally:
        stream.close()


def all_equal(a, b):
    for o, p in zip(a, b, strict=True):
        for v, w in zip(o, p, strict=True):
            assert torch.equal(v, w)


def pixels(img):
    a = torch.from_numpy(np.array(img))
    return a[None] if a.ndim == 2 else a.permute(2, 0, 1)


def plain(img):
    "The image itself, twice"
    return pixels(img), pixels(img)


class Opened(Transform):
    "Counts what is opened; raises, once it is told to"

    n, fail = 0, False

    def encodes(self, o: Image.Image):
        self.n += 1
        if self.fail:
            raise OSError('gone')
        return o


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('num_workers', [0, 2])
def test_stream_repeats_under_seed(make_dls, pool, num_workers):
    loader = make_dls().unlabeled_dl(pool, mu=2, num_workers=num_workers)

    def draw():
        set_seed(7)
        return take(loader, 4)

    all_equal(draw(), draw())


def test_workers_draw_different_views(make_dls):
    "200 views of one image from two workers: the workers must not repeat each other's draws"
    img = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    views = torch.cat([b[1] for b in take(make_dls().unlabeled_dl([img] * 50, bs=50, num_workers=2), 4)])
    assert len({v.numpy().tobytes() for v in views}) > 190


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('n,mu', [(3, 2), (8, 2), (9, 2), (50, 1)])
def test_stream_visits_all_alike(make_dls, pool, n, mu, num_workers):
    loader = make_dls().unlabeled_dl(pool[:n], mu=mu, num_workers=num_workers)
    idxs = torch.cat([b[2] for b in take(loader, n)])
    assert len(idxs) == n * mu * 4, 'always full batches'
    assert torch.bincount(idxs).tolist() == [mu * 4] * n, 'each image equally often'
    finite = [b[2] for b in loader]
    assert sum(map(len, finite)) == (n // (mu * 4) * mu * 4 or n) and len(finite) == len(loader)
    assert len(torch.cat(finite).unique()) == sum(map(len, finite))


@pytest.mark.slow
def test_whole_fit_with_spawned_workers(make_learner):
    "Workers started as on Windows, not forked as in all other tests; afterwards none is left"
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method('spawn', force=True)
    try:
        learn = make_learner(num_workers=1, fixmatch=dict(threshold=0.05))
        quiet_fit(learn, 2)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert len(learn.fix_match.history) == 6 and learn.fix_match.history.pseudo_acc.notna().any()
    assert not multiprocessing.active_children()


def test_fixmatch_takes_the_bs_given(make_dls, pool):
    dls, seen = make_dls(), Seen()
    loader = dls.unlabeled_dl(pool, bs=3, num_workers=0)
    quiet_fit(Learner(dls, tiny_net(), cbs=[FixMatch(loader), seen]), 1)
    assert [n for n, _ in seen.passes] == [4 + 2 * 3] * 3


def test_place_is_of_one_stream_and_goes_on_in_another(make_dls, pool):
    "Also past the end of a pass, and not moved by a stream for this process alone"
    loader = make_dls().unlabeled_dl(pool[:10], bs=7, tfm=plain)
    assert loader.place is None
    batches = take(loader, 3)
    seed, drawn = loader.place
    assert drawn == 21
    next(loader.stream(alone=True))
    assert loader.place == (seed, 21)
    loader.start_at([seed, 7])
    all_equal(take(loader, 2), batches[1:])
    assert loader.place == (seed, 21)
    assert take(loader, 1) and loader.place[0] != seed, 'for one stream only'


def test_loader_is_on_device_and_copies(make_dls, pool):
    loader = make_dls().unlabeled_dl(pool)
    assert {o.device for o in loader.one_batch()} == {torch.device('cpu')}
    assert loader.new(bs=5).one_batch()[0].shape[0] == 5
    assert loader.mu == 7 and loader.new(bs=5).mu is None and loader.new().mu == 7


# --- what is opened --------------------------------------------------------------------------------------------------


FORMS = [
    list,
    tuple,
    set,
    iter,
    pd.Series,
    np.array,
    lambda o: pd.Series(o, index=o),
    lambda o: dict.fromkeys(o).keys(),
]


@pytest.mark.parametrize('form', FORMS)
def test_pool_in_any_form(make_dls, pool, form):
    "In the same order: the images that numbers stand for are the same"
    dls = make_dls()
    given = dls.unlabeled_dl(form(pool), tfm=plain, bs=50, label_func=parent_label, shuffle=False)
    plain_list = dls.unlabeled_dl([*pool.sorted()], tfm=plain, bs=50, label_func=parent_label, shuffle=False)
    for (views, *a), (same, *b) in zip(take(given, 2), plain_list, strict=True):
        all_equal([views, a], [same, b])
    FixMatch(given)
    with pytest.raises(TypeError, match='is a dict: use for example'):
        dls.unlabeled_dl(dict.fromkeys(pool))
    with pytest.raises(
        TypeError, match=r"items of the kind \w*Path, and can't open a row of a table: give the pool as"
    ):
        dls.unlabeled_dl(pd.DataFrame(dict(name=pool)))


def test_a_pool_is_not_predicted_from(make_dls, pool):
    "Nor by a learner without `FixMatch`; to look at it is fine"
    learn = Learner(make_dls(), tiny_net())
    loader = learn.dls.unlabeled_dl(pool, tfm=FixMatchTransform(0.5, 0.5, weak=WEAK), bs=30)
    for dl in (loader, loader.new(drop_last=False), learn.dls.unlabeled_dl(pool[:3])):
        with pytest.raises(ValueError, match=r'two views of each image.*use `learn.dls.test_dl\(items\)`'):
            learn.get_preds(dl=dl)
    assert (
        len([*loader]) == 3 and len(loader.one_batch()) == len(first(loader)) == len(loader.new(bs=5).one_batch()) == 3
    )
    assert len(learn.get_preds(dl=learn.dls.test_dl(pool))[0]) == 100


def test_flip_stays_out_of_pool_images(make_dls, pool):
    "Random item transforms are for training images; the pool is opened as validation opens its images"
    weak, _, idxs = make_dls(item_tfms=FlipItem(p=1.0)).unlabeled_dl(pool, tfm=plain, shuffle=False).one_batch()
    assert torch.equal(weak[3], pixels(Image.open(pool[3])))
    assert idxs[:4].tolist() == [0, 1, 2, 3]


def test_dataframe_and_colour(digits):
    df = pd.DataFrame(dict(name=[str(o) for o in digits[::90]], label=[parent_label(o) for o in digits[::90]]))
    dls = ImageDataLoaders.from_df(
        df,
        path='/',
        fn_col='name',
        label_col='label',
        bs=4,
        num_workers=0,
        seed=0,
        item_tfms=Resize(20),
        img_cls=PILImage,
    )
    loader = dls.unlabeled_dl(df, bs=len(df), label_func=lambda row: row['label'])
    (weak, strong), y, idxs = loader.one_batch()
    assert weak.shape == strong.shape == (20, 3, 20, 20)
    known = {j: dls.vocab[i] for i, j in zip(y.tolist(), idxs.tolist()) if i >= 0}
    assert known == {j: o for j, o in dls.valid_ds.items.label.items() if o in dls.vocab}, 'those to validate on'
    assert len(known) >= 2


def test_show_batch(make_dls, pool):
    for tfm in (None, FixMatchTransform(0.3, 0.3, weak=WEAK), lambda o: (torch.rand(1, 16, 16),) * 2):
        plt.close('all')
        make_dls().unlabeled_dl(pool, tfm=tfm).show_batch(max_n=3)
        axs = plt.gcf().axes
        assert len(axs) == 6 and all(len(ax.images) == 1 for ax in axs)
        assert (axs[0].get_ylabel(), axs[3].get_ylabel()) == ('weak', 'strong')


@pytest.mark.parametrize('tfm', [None, FixMatchBatchTransform()], ids=['workers', 'device'])
@pytest.mark.parametrize('cache', [False, True])
def test_images_of_two_shapes(make_dls, tfm, cache):
    mixed = [np.zeros((s, s), dtype=np.uint8) for s in (16, 18)] * 4
    with pytest.raises(ValueError, match='differ in shape'):
        take(make_dls().unlabeled_dl(mixed, bs=8, tfm=tfm, cache=cache), 1)


# --- files that can't be opened --------------------------------------------------------------------------------------


def huge(file, _):
    "A few kB that would be 400 megapixels"
    Image.new('1', (20000, 20000)).save(file)


DAMAGE = {
    'no image': lambda file, good: file.write_bytes(b'not an image at all'),
    'zero bytes': lambda file, good: file.write_bytes(b''),
    'cut short': lambda file, good: file.write_bytes(good.read_bytes()[: good.stat().st_size * 2 // 3]),
    'missing': lambda file, good: None,
    'a folder': lambda file, good: file.mkdir(),
    'a dead link': lambda file, good: file.symlink_to(file.with_name('nowhere.png')),
    'too large': huge,
}


@pytest.fixture(scope='module')
def damaged(tmp_path_factory, pool):
    folder = tmp_path_factory.mktemp('damaged')
    files = [folder / f'{name}.png' for name in DAMAGE]
    for file, damage in zip(files, DAMAGE.values()):
        damage(file, pool[0])
    return files


@pytest.fixture
def copies(tmp_path, pool):
    "Twenty files that a test may take away"
    return [shutil.copy(o, tmp_path / f'{i}.png') for i, o in enumerate(pool[:20])]


@pytest.mark.slow
@pytest.mark.parametrize('num_workers', [0, 2])
def test_damaged_files_are_replaced_and_listed(make_dls, make_learner, pool, damaged, num_workers):
    dls, seen = make_dls(bs=4, n_batches=4), Seen()
    items = [*damaged[:3], *pool[:30], *damaged[3:]]  # the first, of which the size is learned, is damaged too
    loader = dls.unlabeled_dl(items, mu=7, tfm=FixMatchTransform(weak=WEAK), num_workers=num_workers)
    learn = make_learner(dls=dls, loader=loader, cbs=[seen])
    with pytest.warns(UserWarning, match='could not be opened were replaced by others, 7 so far') as caught:
        quiet_fit(learn, 2)
    assert len([o for o in caught if 'could not be opened' in str(o.message)]) == 1
    assert [n for n, _ in seen.passes] == [4 + 2 * 28] * 8
    table = learn.fix_match.damaged
    assert [items[i] for i in table.index] == list(table.item) and sorted(table.item) == sorted(damaged)
    assert 'DecompressionBomb' in table.error[table.item == damaged[-1]].item()
    assert 'truncated' in table.error[[o.name == 'cut short.png' for o in table.item]].item()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        quiet_fit(learn, 1)  # nothing new to warn of


def test_files_that_vanish_in_training(make_dls, make_learner, copies):
    dls = make_dls()
    learn = make_learner(dls=dls, loader=dls.unlabeled_dl(copies, mu=5, num_workers=0))
    quiet_fit(learn, 1)
    assert len(learn.fix_match.damaged) == 0
    for o in copies[5:]:
        o.unlink()
    with pytest.warns(UserWarning, match='15 so far'):
        quiet_fit(learn, 1)


def test_a_replacement_counts_as_itself(make_dls, pool, damaged):
    "`idxs` and the truth are those of the image that is seen, which FlexMatch's memory needs"
    dls, items = make_dls(), [*pool[:5], damaged[0]]
    (weak, _), y, idxs = take(dls.unlabeled_dl(items, tfm=plain, label_func=parent_label), 1)[0]
    assert len(idxs) == 28 and 5 not in idxs.tolist()
    for img, c, i in zip(weak, y, idxs):
        assert torch.equal(img, pixels(PILImageBW.create(items[i]))) and dls.vocab[c] == parent_label(items[i])


def test_flexmatch_never_learns_damaged_images(make_dls, make_learner, pool, damaged):
    dls = make_dls()
    loader = dls.unlabeled_dl([*damaged, *pool[:10]], num_workers=0)
    learn = make_learner(dls=dls, loader=loader, fixmatch=dict(policy=FlexMatch(threshold=0.0), threshold=0.95))
    with pytest.warns(UserWarning, match='could not be opened'):
        quiet_fit(learn, 2)
    counts = learn.fix_match.policy.counts
    assert counts.sum() == 17 and counts[-1] >= 7


def test_nothing_readable(make_dls, damaged):
    with pytest.raises(
        ValueError,
        match=r'7 of 7 unlabelled images were tried, and none can be opened; place 0 of the '
        r'pool for this reason: UnidentifiedImageError.*Check the files',
    ):
        make_dls().unlabeled_dl(damaged)


def test_nothing_readable_any_more(make_dls, make_learner, copies):
    "All files go while training: the fit ends with a sentence, and the learner stays usable"
    dls = make_dls()
    learn = make_learner(dls=dls, loader=dls.unlabeled_dl(copies[:3], num_workers=0))
    for o in copies:
        o.unlink()
    with pytest.raises(ValueError, match='3 of 3 unlabelled images were tried, and none can be opened'):
        quiet_fit(learn, 1)
    assert len(learn.validate()) == 2


@pytest.mark.parametrize('good', [0, 199])
def test_one_in_two_hundred_is_trained_on(make_dls, tmp_path, pool, good):
    "Each of the others is tried once as a replacement, and no more"
    items = [tmp_path / f'{i}.png' for i in range(200)]
    shutil.copy(pool[0], items[good])
    loader = make_dls().unlabeled_dl(items, bs=40, tfm=FixMatchTransform(weak=WEAK), num_workers=0)
    batches = take(loader, 5)
    assert all((o[-1] == good).all() for o in batches)
    assert len(loader.damaged) == 199 and good not in loader.damaged.index


def test_tries_end_with_the_pool(make_dls, copies, pool):
    opened = Opened()
    loader = make_dls(item_tfms=opened).unlabeled_dl(copies)
    opened.n, opened.fail = 0, True
    with pytest.raises(ValueError, match='20 of 20 unlabelled'):
        take(loader, 1)
    assert opened.n == 20, 'each was tried once'
    opened.fail = False
    assert len(take(loader, 1)[0][-1]) == 28, 'a drive that was away is there again'


def test_one_pass_is_strict(make_dls, pool, damaged):
    "Iterating the loader, and a labelled file that can't be opened, are errors: there each image is asked for by name"
    with pytest.raises(FileNotFoundError, match='missing.png'):
        list(make_dls().unlabeled_dl([*pool[:5], damaged[3]]))
    labeled = ImageDataLoaders.from_path_func(
        '.', [*pool[:9], damaged[3]], lambda o: o.parent.name, valid_pct=0.5, bs=2, num_workers=0, img_cls=PILImageBW
    )
    with pytest.raises(FileNotFoundError, match='missing.png'):
        list(labeled.train) + list(labeled.valid)


def test_show_batch_beside_damaged_files(make_dls, pool, damaged):
    make_dls().unlabeled_dl([*pool[:3], *damaged]).show_batch()
    assert any(ax.images for ax in plt.gcf().axes)


def test_errors_of_a_view_transform_are_no_damage(make_dls, pool):
    def tfm(img):
        raise ZeroDivisionError('a mistake in the transform')

    with pytest.raises(ZeroDivisionError, match='mistake'):
        take(make_dls().unlabeled_dl(pool[:3], tfm=tfm, num_workers=0), 1)


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('cache,tfm', [(True, None), (False, FixMatchBatchTransform())], ids=['cache', 'device'])
def test_damaged_images_beside(make_dls, pool, damaged, num_workers, cache, tfm):
    loader = make_dls().unlabeled_dl([*pool[:20], damaged[0]], bs=21, tfm=tfm, num_workers=num_workers, cache=cache)
    for batch in take(loader, 3):
        assert len(batch[0]) == 21 and 20 not in batch[2]
    assert list(loader.damaged.index) == [20]


N = int(os.environ.get('FUZZ_FILES', 150))


def image_bytes(rng, format):
    h, w = rng.integers(8, 40, 2)
    img = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
    if format == 'PNG' and rng.random() < 0.5:
        img = img.convert(str(rng.choice(['P', 'LA', 'RGBA', '1', 'L'])))
    file = io.BytesIO()
    img.save(file, format, **(dict(progressive=True) if format == 'JPEG' and rng.random() < 0.5 else {}))
    return bytearray(file.getvalue())


def damage(data, rng):
    "One to three of: bytes changed, cut off, cut out, doubled, zeroed, put in front, or changed in the header"

    def change(idxs):
        for k in idxs:
            data[k] = rng.integers(0, 256)

    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        n = len(data)
        if n < 2:
            break
        i, j = sorted(rng.integers(0, n, 2))
        match rng.integers(0, 7):
            case 0:
                change(rng.integers(0, n, rng.integers(1, 12)))
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
                change(rng.integers(0, min(n, 40), 3))  # where sizes and tables are
    return bytes(data)


@pytest.mark.slow
@pytest.mark.timeout(max(300, N))
def test_damaged_bytes(tmp_path):
    "Damaged JPEG and PNG files: training never stops for them, and exactly those that can't be opened are listed"
    rng = np.random.default_rng(0)
    good, bad = [tmp_path / f'{i % 2}_{i}.png' for i in range(12)], []
    for o in good:
        o.write_bytes(image_bytes(rng, 'PNG'))
    for i in range(N):
        format = ('PNG', 'JPEG')[i % 2]
        bad.append(tmp_path / f'bad{i}.{format.lower()}')
        bad[-1].write_bytes(damage(image_bytes(rng, format), rng))
    pool, seen = [*bad, *good], Seen()
    dls = ImageDataLoaders.from_name_func(
        tmp_path, good, lambda o: o[0], valid_pct=0.25, bs=4, item_tfms=Resize(16), num_workers=0, seed=0
    ).repeat_train(-(-len(pool) // 16))  # a pass over the pool
    learn = Learner(dls, tiny_net(2, n_in=3), cbs=[FixMatch(dls.unlabeled_dl(pool, mu=4)), seen], path=tmp_path)
    unreadable = set()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of PIL's own
        quiet_fit(learn, 1)
        for o in pool:
            try:
                PILImage.create(o)
            except Exception:
                unreadable.add(o)
    assert set(learn.fix_match.damaged.item) == unreadable
    assert N // 4 < len(unreadable) < len(pool) and not unreadable & set(good)
    assert [n for n, _ in seen.passes] == [4 + 2 * 16] * len(dls.train)


# --- cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('img_cls', [PILImage, PILImageBW], ids=['RGB', 'L'])
def test_cached_images_are_the_images(make_dls, pool, num_workers, img_cls):
    dls, opts = make_dls(item_tfms=Resize(20), img_cls=img_cls), dict(tfm=plain, bs=50, shuffle=False)
    expected = take(dls.unlabeled_dl(pool, **opts), 2)
    cached = dls.unlabeled_dl(pool, cache=True, num_workers=num_workers, **opts)
    for _ in range(2):
        all_equal(expected, take(cached, 2))  # filled in the first pass, read in the second


def test_each_image_is_opened_once(make_dls, pool):
    opened = Opened()
    dls = make_dls(item_tfms=opened)
    loader = dls.unlabeled_dl(pool, bs=50, cache=True)
    opened.n = 0
    take(loader, 2)
    assert opened.n in (len(pool), len(pool) - 1), 'one was looked at for its size'
    before = opened.n
    take(loader, 6)
    take(loader, 2, dls)
    assert opened.n - before <= 1, 'a stream looks at one image to learn the size'


def test_workers_share_what_they_open(make_dls, copies):
    "With its files gone, another stream's workers have all images, and so has this process"
    loader = make_dls().unlabeled_dl(copies, tfm=plain, bs=10, shuffle=False, num_workers=2, cache=True)
    expected = take(loader, 2)
    third = pixels(Image.open(copies[3]))
    for o in copies:
        o.unlink()
    all_equal(take(loader, 2), expected)
    assert loader.damaged.empty and torch.equal(pixels(loader.dataset.image(3)), third)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_memory_is_shared_for_workers_only(make_dls, pool, monkeypatch, num_workers):
    shared, share = [], torch.Tensor.share_memory_
    monkeypatch.setattr(torch.Tensor, 'share_memory_', lambda self: shared.append(1) or share(self))
    make_dls().unlabeled_dl(pool, num_workers=num_workers, cache=True)
    assert bool(shared) == (num_workers > 0)


def test_one_cache_at_a_time(make_dls, pool):
    "Progressive resizing: another size is another cache, and the old one is let go"
    opened = Opened(), Opened()
    small, large = (make_dls(item_tfms=[Resize(size), o]) for size, o in zip((16, 24), opened))
    loader = small.unlabeled_dl(pool[:20], bs=20, cache=True)

    def new(dls, size):
        "How many images of each size a stream opens"
        for o in opened:
            o.n = 0
        assert take(loader, 1, dls)[0][0].shape[-1] == size
        return tuple(o.n > 3 for o in opened)  # beside those that are looked at for their size

    assert [new(small, 16), new(small, 16), new(None, 16)] == [(True, False), (False, False), (False, False)]
    assert [new(large, 24), new(large, 24)] == [(False, True), (False, False)]
    assert [new(None, 16), new(large, 24)] == [(True, False), (False, False)], 'no cache of the first size any more'
    assert [new(small, 16), new(None, 16)] == [(True, False), (False, False)]


@pytest.mark.parametrize('num_workers', [0, 2])
def test_what_does_not_fit_is_refused(make_dls, pool, monkeypatch, num_workers):
    "100 images of 16×16 in what is free of the memory, or, for workers, of the shared memory"

    def free(memory, shared):
        monkeypatch.setattr(psutil, 'virtual_memory', lambda: SimpleNamespace(available=memory))
        monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=shared))
        make_dls().unlabeled_dl(pool, num_workers=num_workers, cache=True)

    free(25_600, 25_600)
    with pytest.raises(ValueError, match=r'100 images of 16×16 pixels take 2.56e-05 GB.*leave out `cache=True`'):
        free(25_599, 25_600)
    if num_workers and os.path.isdir('/dev/shm'):
        with pytest.raises(ValueError, match='GB of shared memory left'):
            free(25_600, 25_599)
    else:
        free(25_600, 25_599)


def test_cached_images_travel(make_dls, pool):
    "As to a worker process that is not forked"
    loader = make_dls().unlabeled_dl(pool, tfm=plain, bs=100, shuffle=False, cache=True)
    expected = take(loader, 1)[0]
    assert torch.equal(pickle.loads(pickle.dumps(loader.dataset))[5][0], expected[0][5])


@pytest.mark.slow
def test_training_with_a_cache(make_learner, make_dls, pool):
    dls = make_dls()
    learn = make_learner(
        dls=dls,
        loader=dls.unlabeled_dl(
            pool, mu=2, tfm=FixMatchTransform(weak=WEAK), label_func=parent_label, num_workers=2, cache=True
        ),
    )
    quiet_fit(learn, 2)
    quiet_fit(learn, 1)
    assert len(learn.fix_match.history) == 3 and learn.fix_match.history.loss_u.notna().all()
    learn.export()
    assert (learn.path / 'export.pkl').stat().st_size < 200_000


# --- views of batches ------------------------------------------------------------------------------------------------


class Halves:
    "Not ours: views of a whole batch, marked as such"

    takes_batches = True

    def __call__(self, x):
        return x // 2, x // 4


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('cache', [False, True])
def test_views_of_a_batch(make_dls, pool, num_workers, cache):
    loader = make_dls().unlabeled_dl(pool, tfm=Halves(), bs=50, shuffle=False, num_workers=num_workers, cache=cache)
    img = torch.stack([pixels(Image.open(o)) for o in pool[:50]])
    expected = img // 2, img // 4, torch.arange(50)
    all_equal([expected, expected], [take(loader, 1)[0], next(iter(loader))])


def test_truth_beside_views_of_a_batch(make_dls, pool):
    loader = make_dls().unlabeled_dl(pool, tfm=Halves(), bs=50, shuffle=False, label_func=parent_label)
    for (weak, strong), y, idxs in (take(loader, 1)[0], next(iter(loader))):
        assert weak.shape == strong.shape == (50, 1, 16, 16)
        assert y.tolist() == [int(o.parent.name) for o in pool[:50]] and idxs.tolist() == list(range(50))
    loader.show_batch(max_n=3)


@pytest.mark.slow
@pytest.mark.parametrize('num_workers, forward', [(0, 'joint'), (2, 'selective')])
def test_training_with_views_of_batches(make_dls, make_learner, pool, num_workers, forward):
    dls = make_dls()
    loader = dls.unlabeled_dl(
        pool, mu=2, tfm=FixMatchBatchTransform(weak=WEAK), label_func=parent_label, num_workers=num_workers, cache=True
    )
    assert isinstance(loader, UnlabeledDL)
    learn = make_learner(dls=dls, loader=loader, fixmatch=dict(forward=forward))
    assert 'stops' not in str(fixmatch_check(learn))
    quiet_fit(learn, 2)
    assert len(learn.fix_match.history) == 6 and learn.fix_match.history.loss_u.notna().all()
    learn.fix_match.show_pseudo_labels(4)
    learn.export()


def test_same_seed_same_views_of_a_batch(make_dls, pool):
    loader = make_dls().unlabeled_dl(pool, tfm=FixMatchBatchTransform(weak=WEAK), bs=20, shuffle=False)

    def strong(seed):
        torch.manual_seed(seed)
        return take(loader, 1)[0][1]

    assert torch.equal(strong(1), strong(1)) and not torch.equal(strong(1), strong(2))
