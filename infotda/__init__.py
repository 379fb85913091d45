"""Which training examples carry the information behind a prediction, in nats."""
__version__ = "0.1.0"

from infotda.attribution import Selection
from infotda.cluster import ClusterRule, cluster_features, local_cluster, ray_cluster
from infotda.curvature import ggn
from infotda.core import mean_kernel_diag
from infotda.data import Data, TextPairs, flip_labels, has_data, load_data
from infotda.evaluate import (Evaluation, Retrainer, backdoor_queries, backdoor_retrieval, brittleness, coreset_accuracy, found_curve, lds, lds_truth,
                              margin_change, margins, mislabel_curve, plant_backdoor, support_size)
from infotda.extractors import Extractor, extract_features, image_extractor, resnet18_extractor, text_extractor
from infotda.features import Features, PassPlan, tangent_features
from infotda.greedy import ApproxInfoGain, InfoGain, InfoLoss
from infotda.guarantees import certified, greedy_certificate, weak_submodularity_bound
from infotda.index import Index, IndexSelection, build_index, open_index, step_recall
from infotda.influence import EKFAC, GGNInfluence, RelatIF
from infotda.jacobian import per_example_jacobian
from infotda.joint import joint_information  # also gives the three rules their .select_joint
from infotda.laplace import LaplacePosterior, kl_divergence
from infotda.lsi import LSI, lsi_gaussian
from infotda.models import (CIFAR10_RECIPE, DIGITS_RECIPE, FASHION_MNIST_RECIPE, MLP, Recipe, ResNet9, accuracy, digits_mlp, paper_mlp,
                            predict, train)
from infotda.noise import tune_noise
from infotda.ntk import ntk_factors
from infotda.onepass import SingletonInfoLoss, TopCovariance, relative_information
from infotda.outputs import Output, log_prob, logit, margin, token_log_prob, true_logit
from infotda.pipeline import attribute
from infotda.plot import plot_gains, plot_methods, selection_page
from infotda.psmi import PSMI
from infotda.record import bootstrap_interval, student_interval
from infotda.retrain import train_many
from infotda.similarity import BM25, GradCos, GradDot, RandomAttribution, RepSim
from infotda.sketch import Projector, split_half_reliability
from infotda.store import FeatureStore, FeatureStoreMismatch
from infotda.surrogate import info_gain, info_loss, posterior_variance
from infotda.trak import TRAK, training_ridge

__all__ = [
    "ApproxInfoGain", "BM25", "CIFAR10_RECIPE", "ClusterRule", "DIGITS_RECIPE", "Data", "EKFAC", "Evaluation", "Extractor", "FASHION_MNIST_RECIPE",
    "FeatureStore", "FeatureStoreMismatch", "Features", "GGNInfluence", "GradCos", "GradDot", "Index", "IndexSelection", "InfoGain", "InfoLoss",
    "LSI", "LaplacePosterior", "MLP", "Output", "PSMI", "PassPlan", "Projector", "RandomAttribution", "Recipe", "RelatIF", "RepSim", "ResNet9",
    "Retrainer", "Selection", "SingletonInfoLoss", "TRAK", "TextPairs", "TopCovariance", "accuracy", "attribute", "backdoor_queries",
    "backdoor_retrieval", "bootstrap_interval", "brittleness", "build_index", "certified", "cluster_features", "coreset_accuracy", "digits_mlp",
    "extract_features", "flip_labels", "found_curve", "ggn", "greedy_certificate", "has_data", "image_extractor", "info_gain", "info_loss",
    "joint_information", "kl_divergence", "lds", "lds_truth", "load_data", "local_cluster", "log_prob", "logit", "lsi_gaussian", "margin",
    "margin_change", "margins", "mean_kernel_diag", "mislabel_curve", "ntk_factors", "open_index", "paper_mlp", "per_example_jacobian",
    "plant_backdoor", "plot_gains", "plot_methods", "posterior_variance", "predict", "ray_cluster", "relative_information", "resnet18_extractor",
    "selection_page", "split_half_reliability", "step_recall", "student_interval", "support_size", "tangent_features", "text_extractor",
    "token_log_prob", "train", "train_many", "training_ridge", "true_logit", "tune_noise", "weak_submodularity_bound",
]
