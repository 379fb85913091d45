"""Which training examples carry the information behind a prediction, in nats."""
__version__ = "0.1.0"

from infotda.attribution import Selection
from infotda.data import Data, TextPairs, has_data, load_data
from infotda.curvature import ggn
from infotda.features import Features, PassPlan, tangent_features
from infotda.greedy import ApproxInfoGain, InfoGain, InfoLoss
from infotda.guarantees import certified, greedy_certificate, weak_submodularity_bound
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
from infotda.sketch import Projector, split_half_reliability
from infotda.store import FeatureStore, FeatureStoreMismatch
from infotda.surrogate import info_gain, info_loss, posterior_variance

__all__ = [
    "ApproxInfoGain", "CIFAR10_RECIPE", "DIGITS_RECIPE", "Data", "FASHION_MNIST_RECIPE", "FeatureStore", "FeatureStoreMismatch",
    "Features", "InfoGain", "InfoLoss", "LSI", "LaplacePosterior", "MLP", "Output", "PassPlan", "Projector", "Recipe", "ResNet9", "Selection", "SingletonInfoLoss",
    "TextPairs", "TopCovariance", "accuracy", "attribute", "certified", "digits_mlp", "greedy_certificate", "ggn", "has_data", "info_gain", "info_loss",
    "joint_information", "kl_divergence", "load_data", "log_prob", "logit", "lsi_gaussian", "margin", "ntk_factors", "paper_mlp", "per_example_jacobian", "plot_gains",
    "plot_methods", "posterior_variance", "predict", "relative_information", "selection_page", "split_half_reliability", "tangent_features", "token_log_prob",
    "train", "true_logit", "tune_noise", "weak_submodularity_bound",
]
