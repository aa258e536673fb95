"""Fields of OpenAI's API, and of other servers' APIs, that this server does not support.

Clients and frameworks send many fields with their defaults in every request. No-op values are accepted; other values
are rejected with the reason.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bagel_rt.serve.errors import invalid_field

_NO_TOOLS = "The model calls no tools"
_NO_THINKING = "To let the model think first, set think to true"
_NO_STREAM = "Images are sent when they are finished"


@dataclass(frozen=True)
class Neutral:
    """The no-op values of a field; None if all values are, as for hints and labels."""

    values: tuple[object, ...] | None
    remedy: str = ""

    def json_schema(self) -> dict[str, Any]:
        """The accepted values as a JSON schema."""
        return {} if self.values is None else {"enum": [*self.values, None]}

    def check(self, param: str, value: object) -> None:
        """Raise RequestError unless the value is a no-op."""
        if self.values is None or value in self.values:
            return
        *others, last = [*map(json.dumps, self.values), "left out"]
        allowed = f"{', '.join(others)} or {last}" if others else last
        is_choice = isinstance(value, str) and any(isinstance(neutral, str) for neutral in self.values)
        raise invalid_field(
            param, value, allowed, self.remedy, "invalid_value" if is_choice else "unsupported_parameter"
        )


def _only(*values: object, remedy: str = "") -> Neutral:
    return Neutral(values, remedy)


_ANYTHING = Neutral(None)

_EVERYWHERE = {
    "metadata": _ANYTHING,
    "moderation": _only("auto", "low"),
    "prompt_cache_key": _ANYTHING,
    "prompt_cache_options": _ANYTHING,
    "prompt_cache_retention": _ANYTHING,
    "safety_identifier": _ANYTHING,
    "service_tier": _only("auto", "default"),
    "user": _ANYTHING,
}

IMAGES: Mapping[str, Neutral] = _EVERYWHERE | {
    "background": _only("auto", "opaque", remedy="Images have no transparency"),
    "cfg_scale": _only(remedy="Set cfg_text_scale"),
    "complexity": _only(),
    "frame_count": _only(remedy="Animations are not supported"),
    "frame_duration_ms": _only(remedy="Animations are not supported"),
    "guidance_scale": _only(remedy="Set cfg_text_scale"),
    "input_fidelity": _only("low", remedy="Set cfg_img_scale to follow the input images more closely"),
    "markup": _only(remedy="Describe the region in the prompt"),
    "mask": _only(remedy="Describe the region in the prompt"),
    "num_inference_steps": _only(remedy="Set num_timesteps, which is one more"),
    "partial_images": _only(0, remedy=_NO_STREAM),
    "quality": _only("auto", "standard", remedy="Set num_timesteps for more or fewer steps"),
    "response_format": _only("b64_json", remedy="The server stores no images"),
    "stream": _only(False, remedy=_NO_STREAM),
    "style": _only("vivid", remedy="Describe the style in the prompt"),
    "svg": _only(),
}

CHAT: Mapping[str, Neutral] = _EVERYWHERE | {
    "add_generation_prompt": _only(True),
    "audio": _only(remedy="The model writes texts and images"),
    "bad_words": _only([]),
    "best_of": _only(1),
    "chat_template_kwargs": _only({}, {"enable_thinking": False}, remedy=_NO_THINKING),
    "documents": _only([]),
    "echo": _only(False),
    "enable_thinking": _only(False, remedy=_NO_THINKING),
    "frequency_penalty": _only(0),
    "function_call": _only("none", "auto", remedy=_NO_TOOLS),
    "functions": _only([], remedy=_NO_TOOLS),
    "ignore_eos": _only(False),
    "include_reasoning": _only(False),
    "include_stop_str_in_output": _only(False),
    "length_penalty": _only(1),
    "logit_bias": _only({}),
    "logprobs": _only(False),
    "min_p": _only(0),
    "min_tokens": _only(0),
    "parallel_tool_calls": _only(True, False),
    "prediction": _only(),
    "presence_penalty": _only(0),
    "reasoning": _only({}, {"enabled": False}, {"effort": "none"}, remedy=_NO_THINKING),
    "reasoning_effort": _only("none", remedy=_NO_THINKING),
    "repetition_penalty": _only(1),
    "response_format": _only({"type": "text"}, {}, remedy="The model writes free text"),
    "skip_special_tokens": _only(True),
    "spaces_between_special_tokens": _only(True, False),
    "stop_token_ids": _only([], remedy="Set stop to texts"),
    "store": _only(False, remedy="The server stores nothing"),
    "thinking": _only({"type": "disabled"}, remedy=_NO_THINKING),
    "tool_choice": _only("none", "auto", remedy=_NO_TOOLS),
    "tools": _only([], remedy=_NO_TOOLS),
    "top_logprobs": _only(0),
    "typical_p": _only(1),
    "use_beam_search": _only(False),
    "verbosity": _only("medium", remedy="Set max_tokens for a shorter answer"),
    "web_search_options": _only(remedy=_NO_TOOLS),
}

STREAM_OPTIONS: Mapping[str, Neutral] = {"include_obfuscation": _only(False)}

_HINTS = {"cache_control": _ANYTHING, "prompt_cache_breakpoint": _ANYTHING}

MESSAGE: Mapping[str, Neutral] = _HINTS | {
    "annotations": _only([]),
    "audio": _only(remedy="The model reads texts and images"),
    "function_call": _only(remedy=_NO_TOOLS),
    "name": _ANYTHING,
    "reasoning": _only(""),
    "reasoning_content": _only(""),
    "refusal": _only(""),
    "tool_call_id": _only(remedy=_NO_TOOLS),
    "tool_calls": _only([], remedy=_NO_TOOLS),
}

PART: Mapping[str, Neutral] = _HINTS | {"annotations": _only([]), "index": _ANYTHING}

URL: Mapping[str, Neutral] = {"detail": _only("auto", "low", "high", "original"), "format": _ANYTHING}
