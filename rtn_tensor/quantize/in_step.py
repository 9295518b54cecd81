"""Several forward passes of one model that wait for one another before some of its modules."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a module is called with


class _Stopped(BaseException):
    """Ends a pass of which nothing more is wanted; no `except Exception` of a model's catches it."""


class _Pass:
    """A forward pass in a thread of its own, of which only one runs at a time."""

    def __init__(self, call: Callable[[], Any], local: threading.local):
        self.module: nn.Module | None = None  # before which it waits
        self.call: Call = ((), {})
        self.ended = self._stop = False
        self._error: BaseException | None = None
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(call, local), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], Any], local: threading.local) -> None:
        self._go.acquire()
        local.current = self
        try:
            if not self._stop:
                with torch.no_grad():
                    call()
        except _Stopped:
            pass
        except BaseException as error:  # it is raised again where the pass was resumed
            self._error = error
        self.module, self.call, self.ended = None, ((), {}), True
        self._waits.release()

    def wait_before(self, module: nn.Module, call: Call) -> None:
        self.module, self.call = module, call
        self._waits.release()
        self._go.acquire()
        if self._stop:
            raise _Stopped

    def resume(self) -> None:
        """Lets it run until it waits before a module, or has ended."""
        self.module, self.call = None, ((), {})
        self._go.release()
        self._waits.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        self._stop = True
        self._go.release()
        self._thread.join()


def run_in_step(
    calls: Sequence[Callable[[], Any]],
    modules: Sequence[nn.Module],
    reached: Callable[[nn.Module, dict[int, Call]], None],
) -> list[nn.Module]:
    """Runs `calls`, forward passes of one model, each up to the first of `modules` that it would run; hands
    that module, with what each pass would call it with, to `reached`, which may exchange its weights; and
    goes on so until all modules were reached, or all passes have ended. Nothing is run after the last module
    was reached.

    A module that is run several times is reached the first time. Where passes wait before different modules,
    the first of them in `modules` is next.

    Returns:
        The modules that no pass came to.
    """
    local = threading.local()
    left: dict[nn.Module, int] = {module: i for i, module in enumerate(modules)}

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        current = getattr(local, "current", None)  # None in the thread of `reached`, which may run the module
        if current is not None and module in left:
            current.wait_before(module, (args, kwargs))

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in left]
    passes = [_Pass(call, local) for call in calls]
    try:
        for one in passes:
            one.resume()
        while left and (waiting := [one for one in passes if one.module is not None]):
            module = min((one.module for one in waiting if one.module), key=left.__getitem__)
            here = {i: one for i, one in enumerate(passes) if one.module is module}
            reached(module, {i: one.call for i, one in here.items()})
            del left[module]
            for one in here.values() if left else ():
                one.resume()
    finally:
        for hook in hooks:
            hook.remove()
        for one in passes:
            one.stop()
    return list(left)
