"""The simulated vLLM pod: a fake that ships with the package, for the demo, the tests and the benchmarks.

``start_pod(Settings(...))`` serves one in the running event loop; ``create_app`` gives the bare application;
``python -m gateway_extproc.simulator`` (the command ``gateway-extproc pod``) runs one as a process. Modules, from the
pure to the outside: engine (counts, words, queue), jobs (what all APIs share), generative and pooling (the APIs),
clock (how fast it is), faults and control (for tests), metrics, settings, pod (time), server (HTTP), command.
"""

from .server import POD, RunningPod, create_app, start_pod
from .settings import Settings

__all__ = ["POD", "RunningPod", "Settings", "create_app", "start_pod"]
