"The public names of fixmatch_fastai"
from fixmatch_fastai.augment import Cutout, FixMatchBatchTransform, FixMatchTransform, strong_augment, weak_augment
from fixmatch_fastai import show # pictures of `FixMatch`
from fixmatch_fastai.callback import FixMatch
from fixmatch_fastai.check import fixmatch_check
from fixmatch_fastai.checkpoint import SaveFixMatch
from fixmatch_fastai.data import UnlabeledDL, WeakTransform, digits_path, split_labeled
from fixmatch_fastai.ema import ModelEMA
from fixmatch_fastai.experiment import MLflowCallback
from fixmatch_fastai.interpret import PseudoLabelInterpretation, ShowPseudoLabels, plot_to_label, select_to_label
from fixmatch_fastai.meta_pseudo_labels import MetaPseudoLabels
from fixmatch_fastai.policy import (
    UDA,
    AdaMatch,
    AlignedLabels,
    Dash,
    DebiasMatch,
    DistributionAlignment,
    FixedThreshold,
    FlexMatch,
    FreeMatch,
    MultiLabelThreshold,
    Policy,
    PseudoLabels,
    SemiBatch,
    SoftMatch,
)
from fixmatch_fastai.record import StopOnTrouble
from fixmatch_fastai.recipe import FrozenBatchNorm, SchedPartCos, nesterov_sgd, probe, probe_head
from fixmatch_fastai.self_training import (
    DistillationLoss,
    LogitsMSELoss,
    NoisyStudent,
    SoftBCELoss,
    SoftCategoryBlock,
    SoftCrossEntropyLoss,
    SoftFocalLoss,
    SupervisedTwin,
    TableLabels,
    add_drop_path,
    balance_classes,
    compare_supervised,
    predictions,
    pseudo_label,
    read_pseudo_labels,
    self_distill,
    semi_weak,
    soft_accuracy,
    with_pseudo_labels,
)
from fixmatch_fastai.uncertainty import (
    FeatureDensity,
    MCDropout,
    ScoreThreshold,
    ValidatedThreshold,
    add_dropout,
    compare_scores,
    dropout_passes,
    entropy,
    mutual_info,
    one_minus_confidence,
    one_minus_margin,
    one_minus_mean_confidence,
    penultimate,
    predictive_entropy,
    remove_spectral_norm_,
    spectral_norm_,
)
from fixmatch_fastai.warm_start import inpainting_dls, inpainting_learner, inpainting_loss, load_body, rotation_dls, show_inpainting

# `DataLoaders.unlabeled_dl` and `DataLoaders.repeat_train` come with `fixmatch_fastai.data`, `Learner.fit_fixmatch` with `fixmatch_fastai.recipe`,
# `Learner.save_weights` and `Learner.load_weights` with `fixmatch_fastai.checkpoint`
__all__ = ['AdaMatch', 'AlignedLabels', 'Cutout', 'Dash', 'DebiasMatch', 'DistillationLoss', 'DistributionAlignment', 'FeatureDensity', 'FixMatch',
           'FixMatchBatchTransform', 'FixMatchTransform', 'FixedThreshold', 'FlexMatch', 'FreeMatch', 'FrozenBatchNorm', 'LogitsMSELoss', 'MCDropout', 'MLflowCallback',
           'MetaPseudoLabels', 'ModelEMA', 'MultiLabelThreshold', 'NoisyStudent', 'Policy', 'PseudoLabelInterpretation', 'PseudoLabels',
           'SaveFixMatch', 'SchedPartCos', 'ScoreThreshold', 'SemiBatch', 'ShowPseudoLabels', 'SoftBCELoss', 'SoftCategoryBlock',
           'SoftCrossEntropyLoss', 'SoftFocalLoss', 'SoftMatch', 'StopOnTrouble', 'SupervisedTwin', 'TableLabels', 'UDA', 'UnlabeledDL',
           'ValidatedThreshold', 'WeakTransform', 'add_drop_path', 'add_dropout', 'balance_classes', 'compare_scores', 'compare_supervised',
           'digits_path', 'dropout_passes', 'entropy', 'fixmatch_check', 'inpainting_dls', 'inpainting_learner', 'inpainting_loss', 'load_body', 'mutual_info',
           'nesterov_sgd', 'one_minus_confidence', 'one_minus_margin', 'one_minus_mean_confidence', 'penultimate', 'plot_to_label', 'predictions',
           'predictive_entropy', 'probe', 'probe_head', 'pseudo_label', 'read_pseudo_labels', 'remove_spectral_norm_', 'rotation_dls', 'select_to_label', 'self_distill',
           'semi_weak', 'show_inpainting', 'soft_accuracy', 'spectral_norm_', 'split_labeled', 'strong_augment', 'weak_augment',
           'with_pseudo_labels']
