"""What the JSON files of a published folder say of its tokenizer: its class, and which tokens are special."""

from pathlib import Path
from typing import Any

from zoo.published_folder import PretrainedError, read_json

PROPERTIES = ("lstrip", "rstrip", "normalized", "single_word", "special")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

DEFAULTS: dict[str, dict[str, str]] = {
    "BertTokenizer": {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
    "RobertaTokenizer": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "cls_token": "<s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "CLIPTokenizer": {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    },
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "MarianTokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
}
"""Special tokens of the classes whose older files are read, where tokenizer_config.json does not name them."""

SAME_CLASS = {
    "DistilBertTokenizer": "BertTokenizer",
    "ElectraTokenizer": "BertTokenizer",
    "BartTokenizer": "RobertaTokenizer",
}
CLASS_OF_MODEL = {
    "bart": "RobertaTokenizer",
    "bert": "BertTokenizer",
    "clip": "CLIPTokenizer",
    "clip_text_model": "CLIPTokenizer",
    "gpt2": "GPT2Tokenizer",
    "llama": "LlamaTokenizer",
    "marian": "MarianTokenizer",
    "mistral": "LlamaTokenizer",
    "mt5": "T5Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "roberta": "RobertaTokenizer",
    "t5": "T5Tokenizer",
}


class Settings:
    """What the JSON files of a folder say of its tokenizer. Those of its tokenizer_config.json win."""

    def __init__(self, folder: Path):
        config = folder / "tokenizer_config.json"
        self.folder, self.fields = folder, read_json(config) if config.exists() else {}
        legacy = folder / "special_tokens_map.json"
        if "added_tokens_decoder" not in self.fields and legacy.exists():
            self.fields = self.fields | read_json(legacy)
        name = self.fields.get("tokenizer_class")
        if name is None and (folder / "config.json").exists():
            name = CLASS_OF_MODEL.get(str(read_json(folder / "config.json").get("model_type")))
        name = None if name is None else str(name).removesuffix("Fast")
        self.kind = SAME_CLASS.get(name, name) if name else None

    def named(self) -> dict[str, str]:
        """The text of each special token that has a role, by the role; defaults of the class included."""
        given = {role: content(self.fields[role]) for role in NAMED if role in self.fields}
        found = DEFAULTS.get(self.kind or "", {}) | given
        return {role: token for role, token in found.items() if token is not None}

    def properties(self, token: str) -> dict[str, bool]:
        """How a special token with a role is matched, where an object names it."""
        for told in (self.fields.get(role) for role in NAMED):
            if isinstance(told, dict) and told.get("content") == token:
                wrong = [k for k, v in told.items() if k in PROPERTIES and not isinstance(v, bool)]
                if wrong:
                    raise PretrainedError(f"{self.folder}: {wrong[0]} of {token!r} is neither true nor false")
                return {name: told[name] for name in PROPERTIES if name in told and name != "special"}
        return {}

    def added(self) -> dict[int, dict[str, Any]]:
        """Tokens beyond the vocabulary, and those of it that are matched whole, by id, with their properties."""
        told = self.fields.get("added_tokens_decoder")
        if told is None:
            path = self.folder / "added_tokens.json"
            ids = read_json(path) if path.exists() else {}
            special = {*self.named().values(), *self.extra()}
            told = {i: {"content": token, "special": token in special} for token, i in ids.items()}
        entries = list(told.items()) if isinstance(told, dict) else [("?", told)]
        for i, fields in entries:
            if not str(i).isdecimal() or not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
                raise PretrainedError(
                    f"{self.folder}: {fields!r:.60} as {i!r} is no added token with its id and content"
                )
            wrong = [k for k, v in fields.items() if k in PROPERTIES and not isinstance(v, bool)]
            if wrong:
                raise PretrainedError(f"{self.folder}: {wrong[0]} of {fields['content']!r} is neither true nor false")
        return {int(i): fields for i, fields in sorted(entries, key=lambda entry: int(entry[0]))}

    def extra(self) -> list[str]:
        """Special tokens without a role."""
        extra = self.fields.get("extra_special_tokens") or self.fields.get("additional_special_tokens") or []
        extra = list(extra.values()) if isinstance(extra, dict) else extra
        if not isinstance(extra, list):
            raise PretrainedError(f"{self.folder}: extra_special_tokens {extra!r} of tokenizer_config.json is no list")
        return [token for token in map(content, extra) if token is not None]

    def needed(self, role: str) -> str:
        """The token of a role that the class cannot do without."""
        if role not in self.named():
            raise PretrainedError(f"{self.folder}: tokenizer_config.json leaves a {self.kind} without {role}: name one")
        return self.named()[role]

    def chat_template(self, purpose: str) -> tuple[str, str]:
        """The name and text of the template for "tool_use", or "default", which stands in where there is none such."""
        path = self.folder / "chat_template.jinja"
        if path.exists():
            try:
                return str(path), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise PretrainedError(f"{path} is no UTF-8 text: fetch it again") from None
        found = self.fields.get("chat_template")
        if isinstance(found, list):
            named = {fields.get("name"): fields.get("template") for fields in found if isinstance(fields, dict)}
            found = named.get(purpose) or named.get("default")
        if not isinstance(found, str):
            raise PretrainedError(
                f"{self.folder} has no chat template, neither chat_template.jinja nor one in tokenizer_config.json: "
                "write the text for the model yourself, and encode it"
            )
        return f"the chat template of {self.folder}", found

    def flag(self, name: str, default: bool | None) -> Any:
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise PretrainedError(f"{self.folder}: {name} {value!r} of tokenizer_config.json is neither true nor false")
        return default if value is None else value


def content(token: Any) -> str | None:
    """The text of a token that a JSON file names as text or as an object."""
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and (not isinstance(token, str) or not token):
        raise PretrainedError(f"{token!r} is no special token: tokenizer_config.json names them as text")
    return token
