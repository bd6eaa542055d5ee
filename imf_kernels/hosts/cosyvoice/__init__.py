"""Drop-ins for CosyVoice2 and CosyVoice3 (and Chatterbox, whose flow is CosyVoice2's).

Faster at once, distilled by the host's own training, then in as many steps as it should take::

    cfm = cosyvoice.apply_to(flow)  # the loaded flow, faster; `restore(flow)` takes it back

    teacher = Teacher(cfm.model, guidance.from_cosyvoice(cfm.inference_cfg_rate))
    cfm.estimator = cosyvoice.Estimator(cfm.model.student())
    cfm.objective = IntMeanFlow(teacher)
    cosyvoice.freeze(flow)  # the host's own training now distils

    cfm.objective, cfm.grid, cfm.nfe = None, "uniform", 2  # the host's own inference, in 2 steps
"""

from imf_kernels.hosts.cosyvoice.baked import BakedEstimator
from imf_kernels.hosts.cosyvoice.cfm import CFM
from imf_kernels.hosts.cosyvoice.estimator import Estimator
from imf_kernels.hosts.cosyvoice.exportable import ExportableEstimator
from imf_kernels.hosts.cosyvoice.live import apply_to, freeze, from_host, restore

__all__ = [
    "CFM",
    "BakedEstimator",
    "Estimator",
    "ExportableEstimator",
    "apply_to",
    "freeze",
    "from_host",
    "restore",
]
