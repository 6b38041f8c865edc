"""What brings adapters nearer to their slots while others run: threads that read and that stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future

from jaxlora.adapters.adapter import Adapter
from jaxlora.adapters.host_cache import HostCache
from jaxlora.adapters.registered import Registered
from jaxlora.adapters.staging import StagingArea
from jaxlora.errors import AdapterRefusedError
from jaxlora.types import LoRARequest


class Prefetch:
    """From the source to the host's tier, and from there to the staging area.

    ``read`` reads an adapter on a thread of ``readers``.
    """

    def __init__(
        self,
        host: HostCache,
        staging: StagingArea,
        *,
        read: Callable[[LoRARequest], Adapter],
        readers: Executor,
    ) -> None:
        self.staging = staging
        self._host = host
        self._read = read
        self._readers = readers
        self._reads: dict[Future[Adapter], Registered] = {}

    @property
    def is_busy(self) -> bool:
        """Threads are at work, or their work was not taken in yet."""
        return bool(self._reads or self.staging.under_way)

    @property
    def is_awaited(self) -> bool:
        """Threads are at work on what is wanted, or on what stands in its way."""
        return self.is_busy or self.staging.is_making_room

    def start(self, wanted: Sequence[Registered], then: Iterable[Registered] = ()) -> None:
        """Begins to read and to stage what has no slot and is wanted, most urgent first, as far as
        there is room; then, if it is on the host, to stage what may be wanted."""
        news = self.staging.news  # A future keeps what it calls, and this object keeps the future.
        for entry in wanted:
            if entry not in self._host:
                if not self._host.reserve(entry):
                    break
                future = self._readers.submit(_read_again, self._read, entry)
                self._reads[future] = entry
                future.add_done_callback(lambda _: news.set())
        copies = ((entry, self._host.peek(entry)) for entry in (*wanted, *then))
        self.staging.want((entry, copy) for entry, copy in copies if copy is not None)

    def finish(self) -> list[tuple[Registered, Exception]]:
        """Takes in what was read; what could not be read or staged, or is another version now,
        with the reason."""
        failed: list[tuple[Registered, Exception]] = []
        for future in [each for each in self._reads if each.done()]:
            entry = self._reads.pop(future)
            if entry not in self._host:
                continue  # Nobody waited for it any more, and its room was given away.
            error = future.exception()
            if error is None and future.result().version != entry.version:
                error = AdapterRefusedError(
                    f"adapter {entry.name!r} has changed in {entry.request.lora_path!r} since it "
                    f"was registered (version {entry.version}, now {future.result().version}) and "
                    "is no longer in host memory; add it again, with load_inplace=True"
                )
            if error is None:
                self._host.put(entry, future.result())
            elif isinstance(error, Exception):
                self._host.drop(entry)
                failed.append((entry, error))
            else:
                raise error
        return failed + self.staging.failed()

    def wait(self, seconds: float) -> None:
        """Returns once something was read or staged since this returned last, or :meth:`wake` was
        called, or after so many seconds."""
        self.staging.news.wait(seconds)
        # Whatever was told until now is found by who looks from now on.
        self.staging.news.clear()

    def wake(self) -> None:
        """Ends a wait, or the next one; any thread may."""
        self.staging.news.set()


def _read_again(read: Callable[[LoRARequest], Adapter], entry: Registered) -> Adapter:
    return read(entry.request_again())
