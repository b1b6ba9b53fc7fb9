"""A process that forks while another of its threads is inside a call: the child can call too."""

import os
import subprocess
import sys

import pytest

if not hasattr(os, "fork"):
    pytest.skip("needs os.fork", allow_module_level=True)

BEGIN = """
import os, signal, sys, threading
os.environ["TRITON_INTERPRET"] = "1"
import torch, triton_lstm
torch.set_num_threads(1)
torch.manual_seed(0)
LIMIT = 300  # seconds after which what hangs is ended
signal.alarm(LIMIT)
x, module, plain = torch.randn(3, 2, 4), triton_lstm.LSTM(4, 5, backend="triton"), torch.nn.LSTM(4, 5)
plain.load_state_dict(module.state_dict())
expected, right, inside, go = plain(x)[0].detach(), [], threading.Event(), threading.Event()

def call():
    y = module(x)[0]
    y.sum().backward()
    right.append(torch.allclose(y, expected, atol=1e-5))

def fork_and_call():
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT // 3)
        right.clear()
        call()
        os._exit(0 if right == [True] else 9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""

IN_A_LAUNCH = """
from triton_lstm.kernels import launch
shipped = launch._launch_steps

def held(*arguments):
    if threading.current_thread() is thread:
        inside.set()
        go.wait()
    shipped(*arguments)

launch._launch_steps = held
thread = threading.Thread(target=call, daemon=True)
thread.start()
inside.wait()
status = fork_and_call()
go.set()
"""

IN_AN_IMPORT = """
class Held:
    def find_spec(self, name, path=None, target=None):
        if name == "triton.language" and threading.current_thread() is thread:
            inside.set()
            go.wait()

sys.meta_path.insert(0, Held())
os.register_at_fork(before=go.set)  # called before those that were registered earlier
thread = threading.Thread(target=call, daemon=True)
thread.start()
inside.wait()
status = fork_and_call()
"""

END = """
thread.join()
assert status == 0, f"the child ended with {status}"
call()
assert right == [True, True], right
"""


@pytest.mark.parametrize("where", [IN_A_LAUNCH, IN_AN_IMPORT], ids=["in a launch", "in the first call's imports"])
def test_a_forked_child_can_call(where):
    done = subprocess.run([sys.executable, "-c", BEGIN + where + END], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
