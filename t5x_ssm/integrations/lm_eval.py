"""EleutherAI's lm-evaluation-harness on a trained network: its three kinds of requests, and a model that it accepts.

A text begins as it did in training, with the network's own first token, so an empty context needs no other. Rolling
log-likelihoods read a document once from its beginning and carry the state: there is no window, and no token is read twice.
`Requests` needs no harness; `harness_model` does (the extra `eval`).
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_ssm.errors import UserError
from t5x_ssm.inference.decoding import PAD, Generator
from t5x_ssm.inference.ragged import batches, padded
from t5x_ssm.inference.sampling import Sampling
from t5x_ssm.inference.scoring import DocumentScorer

# Tokens between two looks for a stop string.
STEPS_PER_LOOK = 16
# Capacities of full attention are multiples of this, so that batches share their executables.
CAPACITY = 512
GENERATION_SETTINGS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


class Requests:
    """Answers requests in batches of one size, longest first; the answers come in the order of the requests.

    Attributes:
      generator, scorer: of one network and its parameters.
      encode, decode: text to ids without an end, and ids to text.
      eos_id: the id that ends a text, or None.
      vocab_size: ids that may be drawn; None for all of the network's.
      batch_size: requests at a time.
      max_new_tokens: of a generation that does not say.
      seed: of generations that are drawn.
    """

    def __init__(
        self,
        generator: Generator,
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[list[int]], str],
        *,
        eos_id: int | None,
        vocab_size: int | None = None,
        batch_size: int = 8,
        max_new_tokens: int = 256,
        window: int = 1024,
        seed: int = 0,
    ):
        """Makes it; `window` is how many tokens of a document are read at a time, which changes no result."""
        if batch_size < 1 or max_new_tokens < 1:
            raise UserError(f"--batch_size={batch_size}, --max_new_tokens={max_new_tokens}: both must be at least 1.")
        self.generator = generator
        self.scorer = DocumentScorer(generator.network, generator.params, window=window)
        self.encode, self.decode, self.eos_id, self.vocab_size = encode, decode, eos_id, vocab_size
        self.batch_size, self.max_new_tokens, self.seed = batch_size, max_new_tokens, seed

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log p(continuation | context) in nats, whether greedy decoding would write it) of (context, continuation)s."""
        rows = []
        for context, continuation in pairs:
            # A space between the two belongs to the continuation: pieces of text begin with it.
            stripped = context.rstrip()
            whole = self.encode(context + continuation)
            rows.append((whole, min(len(self.encode(stripped)), len(whole))))
        return self._scores(rows)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """log p of whole texts in nats, every token given all before it."""
        return [score for score, _ in self._scores([(self.encode(text), 0) for text in texts])]

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What the network writes after each context, up to the first of the strings `until`, which is left out.

        Args:
          requests: (context, settings) with the harness's settings, see GENERATION_SETTINGS; greedy unless told otherwise.

        Raises:
          UserError: a setting that is not known.
        """
        plans = [self._plan(settings) for _, settings in requests]
        answers: list[str] = [""] * len(requests)
        groups: dict[Hashable, list[int]] = {}
        for i, (sampling, limit, _) in enumerate(plans):
            groups.setdefault((sampling, limit), []).append(i)
        prompts = [self.encode(context) for context, _ in requests]
        for (sampling, limit), members in groups.items():
            members.sort(key=lambda i: -len(prompts[i]))
            for _, batch in batches(members, self.batch_size):
                stops = [plans[i][2] for i in batch]
                texts = self._generate([prompts[i] for i in batch], stops, sampling, limit, batch)
                for i, text in zip(batch, texts, strict=True):
                    answers[i] = text
        return answers

    def _scores(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        """Of (ids, how many of them are given), longest first, so that rows of a batch are of like lengths."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        for _, batch in batches(order, self.batch_size):
            tokens, lengths = padded([rows[i][0] for i in batch], self.batch_size)
            given = np.zeros(self.batch_size, np.int64)
            given[: len(batch)] = [rows[i][1] for i in batch]
            found = self.scorer.score(tokens, lengths, given)
            for j, i in enumerate(batch):
                answers[i] = float(found.log_likelihood[j]), bool(found.greedy[j])
        return answers

    def _plan(self, settings: Mapping[str, Any]) -> tuple[Sampling, int, tuple[str, ...]]:
        unknown = sorted(set(settings) - set(GENERATION_SETTINGS))
        if unknown:
            raise UserError(
                f"The task's generation_kwargs has {', '.join(unknown)}; this model knows {', '.join(GENERATION_SETTINGS)}."
            )
        until = settings.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        temperature = float(settings.get("temperature") or 0.0)
        if not settings.get("do_sample", temperature > 0):
            temperature = 0.0
        elif temperature == 0.0:
            temperature = 1.0
        sampling = Sampling(
            temperature,
            int(settings.get("top_k") or 0),
            float(settings.get("top_p") or 1.0),
            vocab_size=self.vocab_size,
        )
        limit = int(settings.get("max_gen_toks") or self.max_new_tokens)
        return sampling, limit, tuple(stop for stop in stops if stop)

    def _generate(self, prompts, stops, sampling, limit, numbers) -> list[str]:
        tokens, lengths = padded(prompts, self.batch_size)
        capacity = -(-(tokens.shape[1] + limit) // CAPACITY) * CAPACITY
        state = self.generator.read(self.generator.start(self.batch_size, capacity), tokens, lengths)
        # A draw is of the request, whichever batch it comes in.
        seeds = np.full(self.batch_size, self.seed) + np.pad(numbers, (0, self.batch_size - len(numbers)))
        stream = self.generator.generate(
            state, limit, sampling, eos_id=self.eos_id, seeds=seeds, steps_per_call=STEPS_PER_LOOK
        )
        ids: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        running = set(range(len(prompts)))
        while running:
            steps = list(itertools.islice(stream, STEPS_PER_LOOK))
            for row in sorted(running):
                new = list(itertools.takewhile(lambda i: i not in (self.eos_id, PAD), (int(s[row]) for s in steps)))
                ids[row] += new
                text = self.decode(ids[row])
                texts[row], stopped = _until(text, stops[row])
                if stopped or len(new) < STEPS_PER_LOOK:
                    running.discard(row)
        return texts


def _until(text: str, stops: Iterable[str]) -> tuple[str, bool]:
    """The text before the earliest stop string, and whether there is one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def harness_model(requests: Requests) -> Any:
    """A model for `lm_eval.simple_evaluate`.

    Raises:
      UserError: the harness is not installed.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise UserError(f"The evaluation harness cannot be imported ({error}); install t5x_ssm[eval].") from None

    class Model(LM):
        def loglikelihood(self, requests_):
            return requests.loglikelihood([request.args for request in requests_])

        def loglikelihood_rolling(self, requests_):
            return requests.loglikelihood_rolling([request.args[0] for request in requests_])

        def generate_until(self, requests_):
            return requests.generate_until([request.args for request in requests_])

    return Model()
