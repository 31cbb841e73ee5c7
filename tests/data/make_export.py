"""Store a learner exported by this version, which later versions must load

Run once at each release: python tests/data/make_export.py
"""

import json
import os
from pathlib import Path

import numpy as np
from fastai.vision.all import (
    CategoryBlock,
    ConvLayer,
    DataBlock,
    IndexSplitter,
    IntToFloatTensor,
    ItemGetter,
    Learner,
    PILImageBW,
    TensorImageBW,
    TransformBlock,
    accuracy,
    get_image_files,
    nn,
    parent_label,
    set_seed,
)

from fixmatch_fastai import __version__
from fixmatch_fastai.all import (
    FixMatch,
    FixMatchTransform,
    FlexMatch,
    ModelEMA,
    WeakTransform,
    digits_path,
    split_labeled,
    weak_augment,
)

os.chdir(Path(__file__).parent)
file = Path(f'export_{__version__.replace(".", "_")}.pkl')
if file.exists():
    raise SystemExit(f'{file} is there: it must stay as the code of its time made it.')

# Tensors, because `PILImage.create` is pickled with its bytecode, which another Python does not understand
set_seed(0)
files = get_image_files(digits_path()).sorted()
items = [(TensorImageBW(np.array(PILImageBW.create(f))[None]), parent_label(f)) for f in files]
labeled, rest = split_labeled(items, ItemGetter(1), 80)
valid, rest = split_labeled(rest, ItemGetter(1), 20)
pool, rest = split_labeled(rest, ItemGetter(1), 50)
block = DataBlock(
    blocks=(TransformBlock(batch_tfms=IntToFloatTensor), CategoryBlock),
    getters=[ItemGetter(0), ItemGetter(1)],
    splitter=IndexSplitter(range(80, 100)),
    item_tfms=WeakTransform(weak_augment(flip=False)),
)
dls = block.dataloaders(labeled + valid, bs=16, num_workers=0).repeat_train(20)
unlabeled_dl = dls.unlabeled_dl(pool, mu=2, tfm=FixMatchTransform(weak=weak_augment(flip=False)))
net = nn.Sequential(ConvLayer(1, 8, stride=2), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))
cbs = [FixMatch(unlabeled_dl, policy=FlexMatch(0.5)), ModelEMA(half_life=5)]
learn = Learner(dls, net, metrics=accuracy, path='.', cbs=cbs)
with learn.no_bar():
    learn.fit_one_cycle(5, 3e-2)
    learn.export(file)
    cls, _, probs = learn.predict(rest[0])

expected = {
    'image': rest[0][0].tolist(),
    'class': cls,
    'probs': probs.tolist(),
    'vocab': list(dls.vocab),
    'memory': {n: v.tolist() for n, v in learn.fix_match.policy.state_dict().items()},
}
file.with_suffix('.json').write_text(json.dumps(expected) + '\n')
print(f'{file}: {file.stat().st_size} bytes, predicts {cls} with {probs.max():.2f}')
