"What one needs with `FixMatch`; the rest is in its module, as `from fixmatch_fastai.uncertainty import MCDropout`"
from fixmatch_fastai import show, weights # `learn.fix_match.plot` and its like; `learn.save_weights`
from fixmatch_fastai.augment import FixMatchBatchTransform, FixMatchTransform, strong_augment, weak_augment
from fixmatch_fastai.callback import FixMatch
from fixmatch_fastai.check import fixmatch_check
from fixmatch_fastai.checkpoint import SaveFixMatch
from fixmatch_fastai.data import UnlabeledDL # and `dls.unlabeled_dl`
from fixmatch_fastai.ema import ModelEMA
from fixmatch_fastai.interpret import PseudoLabelInterpretation, ShowPseudoLabels, plot_to_label, select_to_label
from fixmatch_fastai.labeled import ( # and `dls.repeat_train`
    StratifiedSplitter,
    WeakTransform,
    digits_dls,
    digits_path,
    split_labeled,
)
from fixmatch_fastai.opening import UprightImage
from fixmatch_fastai.policy import (
    UDA,
    AdaMatch,
    AlignedLabels,
    Dash,
    DebiasMatch,
    FixedThreshold,
    FlexMatch,
    FreeMatch,
    MultiLabelThreshold,
    Policy,
    PseudoLabels,
    SemiBatch,
    SoftMatch,
)
from fixmatch_fastai.recipe import FrozenBatchNorm, probe, probe_head # and `learn.fine_tune_fixmatch`
from fixmatch_fastai.record import StopOnTrouble
from fixmatch_fastai.self_training.compare import compare_supervised
from fixmatch_fastai.self_training.table import pseudo_label, read_pseudo_labels, with_pseudo_labels

__all__ = [
    'AdaMatch', 'AlignedLabels', 'Dash', 'DebiasMatch', 'FixMatch', 'FixMatchBatchTransform', 'FixMatchTransform',
    'FixedThreshold', 'FlexMatch', 'FreeMatch', 'FrozenBatchNorm', 'ModelEMA', 'MultiLabelThreshold', 'Policy',
    'PseudoLabelInterpretation', 'PseudoLabels', 'SaveFixMatch', 'SemiBatch', 'ShowPseudoLabels', 'SoftMatch',
    'StopOnTrouble', 'StratifiedSplitter', 'UDA', 'UnlabeledDL', 'UprightImage', 'WeakTransform', 'compare_supervised',
    'digits_dls', 'digits_path', 'fixmatch_check', 'plot_to_label', 'probe', 'probe_head', 'pseudo_label',
    'read_pseudo_labels', 'select_to_label', 'split_labeled', 'strong_augment', 'weak_augment', 'with_pseudo_labels',
]
