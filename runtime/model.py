"""``Model``: a compiled directory as people use it, and ``load``, which opens one.

Every method is a function of ``tasks`` on the directory's open components: ``embed`` says what the
embeddings are, ``compare`` how they are ranked, ``caption`` and ``chat`` how text is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from internvl_edge.artifact import Artifact, open_artifact
from internvl_edge.runtime.components import AnswerOptions, ImageOptions, OpenComponents
from internvl_edge.runtime.session import (
    Session,
    open_component,
    require_backend,
    require_device,
    require_options,
)
from internvl_edge.runtime.tasks import caption as captions
from internvl_edge.runtime.tasks import chat as chats
from internvl_edge.runtime.tasks import compare, embed
from internvl_edge.runtime.tasks.compare import Retrieval
from internvl_edge.runtime.tasks.embed import DEFAULT_TEMPLATES, TEXT_BATCH, Template
from internvl_edge.runtime.tasks.keywords import named
from internvl_edge.runtime.text.tokenizer import CAPTION_PROMPT
from internvl_edge.types import Array

if TYPE_CHECKING:
    from internvl_edge.runtime.images.transform import Preprocessing, Transform
    from internvl_edge.runtime.openvino.options import OpenVinoOptions
    from internvl_edge.runtime.ort.options import OrtOptions
    from internvl_edge.runtime.tasks.caption import TextStream
    from internvl_edge.runtime.text.tokenizer import OnLong, Tokenizer
    from internvl_edge.runtime.trt.options import TrtOptions

__all__ = ["Model", "Retrieval", "load"]

CAPTION_BEAMS = 5  # of published captions


@named
def load(
    out: str | os.PathLike[str],
    backend: str = "auto",
    device: str = "auto",
    *,
    options: OrtOptions | OpenVinoOptions | TrtOptions | None = None,
    images: ImageOptions | None = None,
    answers: AnswerOptions | None = None,
) -> Model:
    """Open a compiled directory; components open when they are first used.

    Args:
        out: the directory that ``internvl-edge export`` published.
        backend: ``"auto"``, ``"onnxruntime"``, ``"openvino"``, ``"tensorrt-rtx"`` or
            ``"tensorrt"``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        options: of every session, see ``open_session``; None: the backend's defaults.
        images: how pictures are read: what stands under transparency, and how large they may be.
        answers: how text is made: memory for caches of recent prompts, slots that callers share.

    Raises:
        ArtifactError: the directory is not what its manifest says.
        UsageError, MissingDependency, HardwareError: the backend, unknown or not to be had here.
    """
    require_options(require_backend(backend), options)
    device = require_device(device)
    artifact = open_artifact(out)
    return Model(
        artifact,
        partial(open_component, artifact, backend=backend, device=device, options=options),
        images,
        ((os.path.abspath(out), backend, device, options, images, answers), artifact.digest),
        answers,
    )


def _load_again(how: tuple[Any, ...], digest: str) -> Model:
    """Open a model in the process that it was sent to, if the directory is still the same.

    Raises:
        ArtifactError: another one has its place; and what ``load`` raises.
    """
    path, backend, device, options, images, answers = how
    model = load(path, backend, device, options=options, images=images, answers=answers)
    model.artifact.require_digest(digest)
    return model


class Model:
    """The components of a directory, as one model. Thread-safe; a context manager.

    Images are paths, ``data:`` URLs, bytes, open files, PIL images, arrays or tensors, one or
    several; those that come from a generator are read a batch at a time. A float32 array
    [B,3,S,S] is ``pixel_values``, normalised already. Which arrays, files and texts are taken
    stands in docs/reference/inputs.md. Texts are strings, one or a sequence, or token ids, int
    [B,T] as an array or as lists of equal length, 0 where padded (of an InternVL-Chat: the
    tokenizer's own padding).

    Every method raises ``UsageError`` when the directory lacks a component it needs or the model
    is closed, ``MediaError`` when an image or text cannot be read, ``FeedError`` when an array
    does not fit the component, and ``HardwareError`` or ``ResourceError`` when a session does.

    Pickled, for a worker that is spawned, it is its path and options, and is opened there again.

    Args:
        artifact: the open directory.
        open_one: opens the session of a component.
        images: how pictures are read; None: the defaults.
        opened_by: the arguments of ``load``, and the directory's digest; None: it cannot be
            pickled.
        answers: how text is made; None: the defaults.
    """

    def __init__(
        self,
        artifact: Artifact,
        open_one: Callable[[str], Session],
        images: ImageOptions | None = None,
        opened_by: tuple[Any, str] | None = None,
        answers: AnswerOptions | None = None,
    ) -> None:
        self.components = OpenComponents(artifact, open_one, images, opened_by, answers)

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_again, self.components.opened_by()

    # --- encode ----------------------------------------------------------------------------------

    @named
    def encode_image(
        self,
        images: Any,
        mode: str = "c",
        normalize: bool = False,
        batch_size: int = 8,
        transform: Transform | None = None,
    ) -> Array:
        """Embed images, float32 [B,E].

        Args:
            images: see ``Model``.
            mode: ``"c"`` (InternVL-C) or ``"g"`` (InternVL-G).
            normalize: give them unit length.
            batch_size: images that are decoded and computed at a time.
            transform: ``"retrieval"``, ``"classification"`` or ``"clip"``; None is the
                directory's own.
        """
        return embed.encode_image(self.components, images, mode, normalize, batch_size, transform)

    @named
    def encode_text(
        self,
        texts: Any,
        normalize: bool = False,
        batch_size: int = TEXT_BATCH,
        on_long: OnLong = "truncate",
    ) -> Array:
        """Embed texts, float32 [B,E]; strings get the prefix the model was trained with.

        Args:
            texts: see ``Model``.
            normalize: give them unit length.
            batch_size: texts that are computed at a time.
            on_long: what becomes of a text of more than 80 tokens, as wherever texts are taken:
                ``"truncate"`` cuts its end off, and warns of the first one; ``"error"`` refuses.
        """
        return embed.encode_text(self.components, texts, normalize, batch_size, on_long)

    @named
    def encode_video(
        self,
        frames: Any,
        num_frames: int | None = None,
        mode: str = "c",
        normalize: bool = False,
        batch_size: int = 8,
    ) -> Array:
        """Embed one video, float32 [E]: the mean of its frames' embeddings.

        Args:
            frames: a folder of frames, a video file (with PyAV, extra ``video``), or images.
            num_frames: sample at most so many of them; None takes all.
            mode: ``"c"`` or ``"g"``.
            normalize: give the mean unit length.
            batch_size: frames that are computed at a time.
        """
        return embed.encode_video(self.components, frames, num_frames, mode, normalize, batch_size)

    @named
    def text_classifier(
        self,
        labels: Sequence[str],
        templates: Sequence[Template] = DEFAULT_TEMPLATES,
        on_long: OnLong = "truncate",
    ) -> Array:
        """Embed labels, float32 [K,E]: unit vectors, each the mean over the templates' own.

        The last sets of labels are remembered, so that classifying again costs no text.

        Raises:
            UsageError: a label twice, a template without one ``{}`` or ``{c}``.
            MediaError: no labels, or an empty one.
        """
        return embed.text_classifier(self.components, labels, templates, on_long)

    # --- compare ---------------------------------------------------------------------------------

    @named
    def classify(
        self,
        images: Any,
        labels: Sequence[str],
        templates: Sequence[Template] = DEFAULT_TEMPLATES,
        mode: str = "c",
        batch_size: int = 8,
        top_k: int | None = None,
        on_long: OnLong = "truncate",
    ) -> list[list[dict[str, Any]]]:
        """Classify images zero-shot, by softmax over 100 · cosine (docs/model.md, section 10).

        Args:
            images: see ``Model``.
            labels: the classes.
            templates: each with ``{}`` or ``{c}`` where the label goes, or a function of it.
            mode: ``"c"`` or ``"g"``.
            batch_size: images that are computed at a time.
            top_k: of the labels, the best so many; None is all.
            on_long: see ``encode_text``.

        Returns:
            For every image its labels, best first: ``{"label": str, "score": float, "cosine":
            float}``. Scores compare the labels given, so that a single one always has 1; its
            cosine says how near it is.
        """
        return compare.classify(
            self.components, images, labels, templates, mode, batch_size, top_k, on_long
        )

    @named
    def retrieve(
        self,
        images: Any,
        texts: Any,
        mode: str = "c",
        batch_size: int = 8,
        on_long: OnLong = "truncate",
    ) -> Retrieval:
        """Rank texts for every image and images for every text by cosine similarity."""
        return compare.retrieve(self.components, images, texts, mode, batch_size, on_long)

    @named
    def classify_videos(
        self,
        videos: Iterable[Any],
        labels: Sequence[str],
        templates: Sequence[Template] = DEFAULT_TEMPLATES,
        mode: str = "c",
        num_frames: int | None = 8,
        batch_size: int = 8,
        top_k: int | None = None,
        on_long: OnLong = "truncate",
    ) -> list[list[dict[str, Any]]]:
        """Classify videos as ``encode_video`` takes them; see ``classify``."""
        return compare.classify_videos(
            self.components,
            videos,
            labels,
            templates,
            mode,
            num_frames,
            batch_size,
            top_k,
            on_long,
        )

    @named
    def retrieve_videos(
        self,
        videos: Iterable[Any],
        texts: Any,
        mode: str = "c",
        num_frames: int | None = 8,
        batch_size: int = 8,
        dual: bool = True,
        on_long: OnLong = "truncate",
    ) -> Retrieval:
        """Rank videos as ``encode_video`` takes them and texts; see ``retrieve``.

        Args:
            videos: at least one.
            texts: see ``Model``.
            mode: ``"c"`` or ``"g"``.
            num_frames: sampled of each; None takes all.
            batch_size: frames that are computed at a time.
            dual: rank by ``video.dual_softmax`` over all that ask, as MSR-VTT's published results;
                ``similarity`` is the cosine in any case.
            on_long: see ``encode_text``.
        """
        return compare.retrieve_videos(
            self.components, videos, texts, mode, num_frames, batch_size, dual, on_long
        )

    @named
    def match(
        self, images: Any, texts: Any, batch_size: int = 8, on_long: OnLong = "truncate"
    ) -> Array:
        """Compute how likely each text describes its image, float32 [B] in 0..1 (ITM head).

        Image i goes with text i; one image or one text goes with all of the other. Slower and more
        precise than ``retrieve``: QLLaMA reads the text and the image together.
        """
        return np.concatenate(list(self.match_stream(images, texts, batch_size, on_long)))

    @named
    def match_stream(
        self, images: Any, texts: Any, batch_size: int = 8, on_long: OnLong = "truncate"
    ) -> Iterator[Array]:
        """Match as ``match``, a few pairs as soon as they are known: float32 [batch_size]."""
        return compare.match_stream(self.components, images, texts, batch_size, on_long)

    # --- text ------------------------------------------------------------------------------------

    @named
    def see(
        self, images: Any, batch_size: int | None = None, max_tiles: int | None = None
    ) -> captions.Seen | chats.ChatSeen:
        """Look at images once for many captions, answers and chats, which take the result.

        Args:
            images: see ``Model``.
            batch_size: images, or tiles of an InternVL-Chat, at a time; None: 8, or fewer tiles
                where memory has less room.
            max_tiles: as for ``chat``.
        """
        return chats.see_images(self.components, images, batch_size, max_tiles)

    def caption(
        self,
        images: Any,
        prompt: Any = CAPTION_PROMPT,
        *,
        num_beams: int | None = None,
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
        batch_size: int = 8,
        **how: Any,
    ) -> list[str]:
        """Caption each image; published captions have 5 beams and 8 to 30 new tokens.

        Args:
            images: see ``Model``, or what ``see`` gave.
            prompt: what the caption continues.
            num_beams: sentences kept under way; 1 is greedy. None: 5, and 1 where tokens are drawn
                or ``temperature`` is 0.
            max_new_tokens: the most.
            min_new_tokens: the fewest.
            batch_size: images that are decoded and computed at a time.
            how: more fields of ``runtime.generation.batch.Generation``: ``length_penalty``,
                ``repetition_penalty``, and of one beam ``temperature`` (0: the likeliest
                token), ``top_k``, ``top_p``, ``seed`` and ``do_sample``.

        Raises:
            UsageError: an option that cannot be, or more positions than the cache has.
        """
        if num_beams is None:
            chosen = captions.generation(self.components, **how)
            num_beams = 1 if chosen.is_sampled or chosen.temperature == 0 else CAPTION_BEAMS
        how |= {"num_beams": num_beams, "min_new_tokens": min_new_tokens}
        options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, **how}
        return self.answer(images, prompt, **options)

    def answer(
        self,
        images: Any,
        prompts: Any,
        *,
        max_new_tokens: int = 30,
        batch_size: int = 8,
        **how: Any,
    ) -> list[str]:
        """Continue prompt i on image i with text; greedy unless told otherwise.

        One image or one prompt goes with all of the other; the ViT runs once per image.

        Args:
            images: see ``Model``, or what ``see`` gave.
            prompts: strings such as ``"Question: how many digits? Answer:"``, or ids, padded in
                front with 0.
            max_new_tokens: the most.
            batch_size: rows that are computed at a time.
            how: as for ``caption``.
        """
        chosen = captions.generation(self.components, max_new_tokens=max_new_tokens, **how)
        ids = captions.continued(self.components, images, prompts, chosen, batch_size)
        return captions.texts_of(self.components, ids, chosen)

    def generate(
        self,
        images: Any,
        prompts: Any,
        *,
        max_new_tokens: int = 30,
        batch_size: int = 8,
        **how: Any,
    ) -> Array:
        """Continue as ``answer``; return the new token ids, int64 [B,N], 0 after the end.

        Of an InternVL-Chat, ``prompts`` are ids [B,T] with places for image tokens, which every
        image fills in order; ``image_token_id`` among ``how`` says which id a place has, if the
        checkpoint had no tokenizer files that do. ``images`` None: there are none.
        """
        place = how.pop("image_token_id", None)
        chosen = captions.generation(self.components, max_new_tokens=max_new_tokens, **how)
        if chats.is_chat(self.components):
            return chats.continued(self.components, images, prompts, chosen, batch_size, place)
        return captions.continued(self.components, images, prompts, chosen, batch_size)

    def stream(
        self, image: Any, prompt: Any = CAPTION_PROMPT, *, max_new_tokens: int = 30, **how: Any
    ) -> TextStream:
        """Answer one prompt on one image, in pieces as they come."""
        chosen = captions.generation(self.components, max_new_tokens=max_new_tokens, **how)
        return captions.pieces(self.components, image, prompt, chosen)

    def chat(
        self,
        images: Any,
        question: str,
        history: Sequence[chats.Turn] | None = (),
        *,
        template: str | None = None,
        system: str | None = None,
        think: bool = False,
        max_tiles: int | None = None,
        max_new_tokens: int | None = None,
        **how: Any,
    ) -> chats.Reply:
        """Answer a question in a conversation about images.

        Of an InternVL-Chat the history is part of the prompt, and questions say ``<image>`` where
        the next image stands; without it all images stand before the first question. An
        InternVL-G answers ``Question: … Answer:`` about one image: it was trained on single
        questions, so its history is kept for the caller and not read; it has neither templates nor
        system sentences.

        Args:
            images: all images of the conversation, see ``Model``, or what ``see`` gave; None: none.
                Of an InternVL-Chat, one of several may be a list: images that share a place.
            question: what is asked now. ``<video>`` in it is the place of all images that have
                none of their own, as frames: ``Frame1: <image>``, ``Frame2: <image>``, ….
            history: of the ``Reply`` before; also pairs of question and answer.
            template: how the prompt is spelled; the checkpoint's own by default.
            system: instead of the checkpoint's own sentence, or the template's.
            think: ask for a thought before the answer, by the sentence that InternVL3.5 knows. It
                is drawn at temperature 0.6, top_p 0.95, unless options say otherwise.
            max_tiles: the most tiles of an image, without its thumbnail; the model's own by
                default. 1 for the frames of a video.
            max_new_tokens: the most; None: 1024, or as many as there is room for.
            how: as for ``caption``.

        Returns:
            The answer, and the history to go on with, every image in its place; the thought apart.

        Raises:
            UsageError: places for images that are not as many as images, an unknown template, or
                more positions than the cache has.
            MediaError: an empty question, or an image that cannot be read.
        """
        options = chats.ChatOptions(
            template=template,
            system=system,
            think=think,
            max_tiles=max_tiles,
            fits=max_new_tokens is None,
        )
        chosen = chats.generation(self.components, options, max_new_tokens, how)
        return chats.reply(self.components, images, question, history, chosen, options)

    def chat_stream(
        self,
        images: Any,
        question: str,
        history: Sequence[chats.Turn] | None = (),
        *,
        template: str | None = None,
        system: str | None = None,
        think: bool = False,
        max_tiles: int | None = None,
        max_new_tokens: int | None = None,
        **how: Any,
    ) -> TextStream:
        """Answer as ``chat``, in pieces as they come; ``close`` ends it between two tokens.

        A thought is not among the pieces: it is the stream's ``thought`` once they begin.
        """
        options = chats.ChatOptions(
            template=template,
            system=system,
            think=think,
            max_tiles=max_tiles,
            fits=max_new_tokens is None,
        )
        chosen = chats.generation(self.components, options, max_new_tokens, how)
        return chats.reply_pieces(self.components, images, question, history, chosen, options)

    def chat_prompt(
        self,
        images: Any,
        question: str,
        history: Sequence[chats.Turn] | None = (),
        system: str | None = None,
        template: str | None = None,
        max_tiles: int | None = None,
        *,
        think: bool = False,
    ) -> tuple[str, list[int]]:
        """Spell what ``chat`` would put to the model: the text, and its ids.

        ``<IMG_CONTEXT>`` stands in the text, and its id among the ids, for every token of an image.
        Images are cut into tiles and not computed.
        """
        options = chats.ChatOptions(
            template=template, system=system, think=think, max_tiles=max_tiles
        )
        return chats.prompt_of(self.components, images, question, history, options)

    def chat_frames(self, video: str | os.PathLike[str], num_frames: int = 8) -> list[Any]:
        """Read the frames of a video that a conversation looks at, as this model was used.

        They go into ``chat`` as images, with ``<video>`` in the question and ``max_tiles=1``.

        Args:
            video: a video file (with PyAV, extra ``video``), or a folder of frames.
            num_frames: how many; 8 to 32 in training.
        """
        return chats.frames_of(self.components, video, num_frames)

    # --- sessions --------------------------------------------------------------------------------

    @property
    def artifact(self) -> Artifact:
        """The open directory."""
        return self.components.artifact

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the directory; UsageError where its checkpoint had none."""
        return self.components.tokenizer

    @property
    def preprocessing(self) -> Preprocessing:
        """The image transforms of the directory."""
        return self.components.preprocessing

    def session(self, component: str) -> Session:
        """Open the session of a component, once; the model closes it."""
        return self.components.session(component)

    def close(self) -> None:
        """Close every session; may be called again."""
        self.components.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
