"""The engine: one thread owns the devices and generates the texts of all clients in one batch.

All methods are for the thread of the event loop, which never waits for the devices. A client that reads slowly delays
no other: its tokens wait in its own queue, which is as short as its text.
"""

import asyncio
import functools
import queue
import threading
from collections.abc import AsyncIterator, Callable

import jax

from launch.serving.errors import ApiError, queue_is_full, stopping
from model.generate import Batch, News, Text


class Job:
    """A text that a client waits for."""

    def __init__(self, text: Text, cancel: Callable[["Job"], None]):
        self.text = text
        self._cancel = cancel
        self._news: asyncio.Queue[News | ApiError] = asyncio.Queue()

    def put(self, news: News | ApiError) -> None:
        self._news.put_nowait(news)

    def cancel(self) -> None:
        """Frees the slot of the text; nothing happens if it has ended."""
        self._cancel(self)

    async def news(self) -> AsyncIterator[News]:
        """The tokens as they are made, up to the last. Raises ApiError if the text ends early."""
        while True:
            news = await self._news.get()
            if isinstance(news, ApiError):
                raise news
            yield news
            if news.ended:
                return


class Engine:
    """Generates texts until it is closed.

    Args:
      batch: is used only by the thread from now on.
      most: how many texts may be generated or wait at a time.
      on_error: is called when the thread has failed.

    Attributes:
      accepts: whether new texts are accepted.
      error: what the thread failed with.
    """

    def __init__(self, batch: Batch, *, most: int, on_error: Callable[[], None]):
        self.accepts = True
        self.error: BaseException | None = None
        self._batch = batch
        self._most = most
        self._on_error = on_error
        self._jobs: dict[Text, Job] = {}
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._mesh = jax.sharding.get_mesh()
        self._thread = threading.Thread(target=self._work, name="engine")
        self._thread.start()

    @property
    def count(self) -> int:
        """How many texts are generated or wait."""
        return len(self._jobs)

    def check(self) -> None:
        """Raises ApiError if no text is accepted now."""
        if not self.accepts:
            raise stopping()
        if self.count >= self._most:
            raise queue_is_full(self.count)

    def submit(self, text: Text) -> Job:
        """Puts the text in the queue. Raises ApiError if it is full, or if the server stops."""
        self.check()
        job = self._jobs[text] = Job(text, self._cancel)
        self._orders.put(functools.partial(self._batch.add, text))
        return job

    def _cancel(self, job: Job) -> None:
        if self._jobs.pop(job.text, None):
            self._orders.put(functools.partial(self._batch.remove, job.text))

    async def close(self) -> None:
        """Ends the thread after its current step; texts that are not finished end with an error."""
        self.accepts = False
        self._orders.put(None)
        await asyncio.to_thread(self._thread.join)
        self._end_all(stopping())

    def _end_all(self, error: ApiError) -> None:
        for job in self._jobs.values():
            job.put(error)
        self._jobs.clear()

    def _deliver(self, all_news: list[News]) -> None:
        for news in all_news:
            if not len(news.tokens):  # its context is full, and is read again in the next step
                continue
            if job := self._jobs.get(news.text):
                job.put(news)
                if news.ended:
                    del self._jobs[news.text]

    def _fail(self) -> None:
        self.accepts = False
        self._end_all(ApiError(500, "the server has failed, and ends"))
        self._on_error()

    # On the thread

    def _work(self) -> None:
        jax.set_mesh(self._mesh)  # it is that of a thread; without it, all programs would be compiled again
        try:
            while self._obey():
                if news := self._batch.step():
                    self._loop.call_soon_threadsafe(self._deliver, news)
        except BaseException as e:
            self.error = e
            self._loop.call_soon_threadsafe(self._fail)

    def _obey(self) -> bool:
        """Carries out all orders, and waits for one if there is nothing to do; whether the thread continues."""
        while self._batch.idle or not self._orders.empty():
            if (order := self._orders.get()) is None:
                return False
            order()
        return True
