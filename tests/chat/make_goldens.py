"""Makes tests/chat/tokenizers and tests/chat/goldens: what transformers makes of the templates beside this file.

    python tests/chat/make_goldens.py

Needs transformers (with jinja2) and tokenizers; nothing is downloaded. The tokenizers are small ones, trained here, in the
layouts of the families: byte-level BPE with the pre-tokenizer of Llama 3 and of Qwen, and SentencePiece-like BPE with
byte fallback, with (Mistral, Phi-3) and without (Gemma) a space before the text. The templates are ours: what they have of
a family is its special tokens and its layout.
"""

import collections
import copy
import datetime
import json
import pathlib
import platform

import jinja2
import tokenizers
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent
VERSIONS = {
    "python": platform.python_version(),
    "transformers": transformers.__version__,
    "tokenizers": tokenizers.__version__,
    "jinja2": jinja2.__version__,
}
NOW = datetime.datetime(2025, 2, 3, 4, 5, 6)


class FixedClock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


chat_template_utils.datetime = FixedClock

# ---- tokenizers -------------------------------------------------------------------------------------------------------

CORPUS = """
A baker sells 24 rolls in the morning and 18 rolls in the afternoon. How many rolls does she sell in all? Yes, she sells
24 + 18 = 42 rolls. The answer is 42. No, that is wrong: 24 + 18 is not 44. Is this answer correct? YES. NO. Yes. No. yes no
You are a helpful assistant. user assistant system tool function name arguments parameters description type string object
The user asks a question and the assistant answers it step by step. Think first, then answer. First, add the numbers. Then
check the result. #### 42 Today Date: Cutting Knowledge Date: December 2023 Environment: What is the weather in Paris today?
def add(a, b):\n    return a + b\n\nfor i in range(10):\n\tprint(i, add(i, 1))\n{"name": "add", "arguments": {"a": 1, "b": 2}}
Der Bäcker verkauft Brötchen für zwölf Euro. Où est la bibliothèque ? ¿Cuántos años tienes? Привет, как дела? 你好，世界。今天天气很好。
日本語のテキストです。한국어 텍스트입니다. مرحبا بالعالم. 1 2 3 10 100 1000 2024 3.14 0.5 1,000,000 don't it's we're I'll they've
"""

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def special(*names):
    return [AddedToken(name, special=True, normalized=False) for name in names]


def plain(*names):
    return [AddedToken(name, special=False, normalized=False) for name in names]


def byte_level(split, normalizer, added, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS] * 2, trainer)
    tokenizer.add_tokens(added)
    return tokenizer


def sentence_piece(prepend, added, vocab_size):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prepend else []))
    # As sentencepiece has it, no token reaches over a word's beginning.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), behavior="merged_with_next")
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    first = ["<pad>", "<eos>", "<bos>", "<unk>"] if not prepend else ["<unk>", "<s>", "</s>"]
    # The alphabet is bounded, so that what is beyond it falls back to bytes; bounded here, for the same result every time.
    counts = collections.Counter(CORPUS)
    kept = set(sorted(counts, key=lambda c: (-counts[c], c))[:90])
    corpus = "".join(c if c in kept else "\n" for c in CORPUS)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=first + fallback, show_progress=False)
    tokenizer.train_from_iterator([corpus] * 2, trainer)
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens(added)
    return tokenizer


TOKENIZERS = {
    "llama3": lambda: byte_level(
        LLAMA3_SPLIT,
        None,
        special("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
        640,
    ),
    "qwen": lambda: byte_level(
        QWEN_SPLIT,
        normalizers.NFC(),
        special(
            "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|/tool|>",
            "<|end|>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
        )
        + plain("<think>", "</think>", "<tool_call>", "</tool_call>"),
        640,
    ),
    "mistral": lambda: sentence_piece(
        True,
        special(
            "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
            "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
        ),
        760,
    ),
    "gemma": lambda: sentence_piece(False, special("<start_of_turn>", "<end_of_turn>"), 760),
}

DIFFICULT = [
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "  two  spaces   three",
    "tabs\tand\nnew\r\nlines\n\n\n  indented\n",
    "\n",
    "\n\n Hello",
    "don't it's WE'RE I'LL",
    "1 12 123 1234 12345678 3.14159 1,000,000 ½ ²",
    "def f(x):\n    return {'a': [x, x ** 2]}  # comment\n",
    "你好，世界！今天天气很好。",
    "日本語テキスト と 한국어 텍스트",
    "مرحبا بالعالم שלום",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪",
    "e\u0301 versus \u00e9, a\u030a\u0323",
    "zero\u200bwidth\u00a0nbsp\u3000ideographic\u2028line",
    "\ufeffbom",
    "x" * 60,
    "<|im_start|>user\nhi<|im_end|>",
    "a<|eot_id|>b <|eot_id|> c",
    "<s>[INST] hi [/INST]</s>",
    "<bos><start_of_turn>user\nhi<end_of_turn>",
    "<think>\nhm\n</think>\n\nok",
    "<0x41> <unk> <|not_a_token|>",
    "▁already▁marked ▁ x",
    "ﬁ Å Ω ǆ",
    "\x00\x01\x7f",
]


def tokenizer_golden(tokenizer):
    cases = []
    for text in DIFFICULT:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        cases.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=False),
                      "visible": tokenizer.decode(ids, skip_special_tokens=True)})
    return {"versions": VERSIONS, "cases": cases}


# ---- conversations ----------------------------------------------------------------------------------------------------


def turn(role, content, **extra):
    return {"role": role, "content": content, **extra}


SYSTEM = turn("system", "You are a baker.")
ASK = turn("user", "How many rolls are 24 + 18?")
REPLY = turn("assistant", "24 + 18 = 42 rolls.")
AGAIN = turn("user", "Is this correct? 你好 👍🏽\n\n  Yes or no.")
SPACED = turn("user", "  \n spaced out \n ")
THOUGHT = turn("assistant", "<think>\nadd them\n</think>\n\n42.")
REASONED = turn("assistant", "42.", reasoning_content="add them")
PARTS = turn("user", [{"type": "text", "text": "two "}, {"type": "text", "text": " parts"}])
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds \"two\" numbers; größer < 10 & > 1",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number", "default": 0.5}},
            "required": ["a"],
            "strict": True,
            "example": None,
            "empty": [],
        },
        "return": {"type": "number"},
    },
}
CALL = turn("assistant", "", tool_calls=[
    {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 24, "b": 18.0, "s": "é"}}}
])
RESULT = turn("tool", "42", tool_call_id="abcdefghi", name="add")


def case(*messages, prompt=True, tools=None, **variables):
    return {"messages": list(messages), "tools": tools, "variables": variables, "add_generation_prompt": prompt}


TALK = [case(ASK), case(ASK, prompt=False), case(ASK, REPLY, AGAIN), case(ASK, REPLY, prompt=False), case(SPACED)]
WITH_SYSTEM = [case(SYSTEM, ASK), case(SYSTEM, ASK, REPLY, AGAIN)]
TOOLS = [case(ASK, tools=[TOOL]), case(SYSTEM, ASK, tools=[TOOL, TOOL]), case(ASK, CALL, RESULT, tools=[TOOL])]

EXTRA = {"s": "a\"b\\c\n\u0001\u007fé 😀 </x>", "n": 1, "f": 1.0, "big": 1e22, "small": 1.5e-7, "t": True, "none": None,
         "list": [], "dict": {}, "nested": {"b": [1, {"c": 2}], "a": "x"}}

FAMILIES = {
    "llama3": ("llama3", {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, TALK + WITH_SYSTEM),
    "llama3_1": (
        "llama3",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        TALK + WITH_SYSTEM + TOOLS + [
            case(ASK, date_string="1 Jan 2001"),
            case(SYSTEM, ASK, tools=[TOOL], tools_in_user_message=False),
            case(turn("tool", PARTS["content"]), prompt=False),
            case(SYSTEM, tools=[TOOL]),
        ],
    ),
    "chatml": ("qwen", {"eos_token": "<|im_end|>"}, TALK + WITH_SYSTEM),
    "qwen2_5": ("qwen", {"eos_token": "<|im_end|>"}, TALK + WITH_SYSTEM + TOOLS),
    "qwen3": (
        "qwen",
        {"eos_token": "<|im_end|>"},
        TALK + WITH_SYSTEM + TOOLS + [
            case(ASK, enable_thinking=False),
            case(ASK, enable_thinking=True),
            case(ASK, THOUGHT, AGAIN),
            case(ASK, THOUGHT, prompt=False),
            case(ASK, REASONED, prompt=False),
            case(ASK, REASONED, AGAIN),
        ],
    ),
    "mistral": (
        "mistral",
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        TALK + WITH_SYSTEM + TOOLS + [case(REPLY, ASK), case(ASK, turn("critic", "no"))],
    ),
    "falcon3": ("qwen", {"eos_token": "<|endoftext|>"}, TALK + WITH_SYSTEM),
    "phi3": ("mistral", {"bos_token": "<s>", "eos_token": "<|endoftext|>"}, TALK + WITH_SYSTEM),
    "phi4_mini": (
        "qwen",
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        TALK + WITH_SYSTEM + [case(turn("system", "Be brief.", tools="[1]"), ASK)],
    ),
    "deepseek_r1": (
        "qwen",
        {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
        TALK + WITH_SYSTEM + [case(ASK, THOUGHT, AGAIN), case(ASK, REASONED, AGAIN)],
    ),
    "gemma": (
        "gemma",
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        TALK + WITH_SYSTEM + [case(SYSTEM, ASK, fold_system=True), case(PARTS), case(ASK, ASK), case(turn("user", None))],
    ),
    "olmo2": ("qwen", {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, TALK + WITH_SYSTEM),
    "constructs": (
        "qwen",
        {},
        [case(turn("user", " hello world "), SYSTEM, turn("assistant", "x"), ASK, extra=EXTRA)],
    ),
}


def render(template, special_tokens, given):
    given = copy.deepcopy(given)
    rendered, _ = chat_template_utils.render_jinja_template(
        conversations=[given["messages"]],
        tools=given["tools"],
        chat_template=template,
        add_generation_prompt=given["add_generation_prompt"],
        **{**special_tokens, **given["variables"]},
    )
    return rendered[0]


def family_golden(name, trained):
    tokenizer_name, special_tokens, cases = FAMILIES[name]
    template = (HERE / "templates" / f"{name}.jinja").read_text()
    golden = []
    for given in cases:
        try:
            text = render(template, special_tokens, given)
            ids = trained[tokenizer_name].encode(text, add_special_tokens=False).ids
            outcome = {"text": text, "ids": ids}
        except jinja2.exceptions.TemplateError as error:
            outcome = {"error": str(error)}
        golden.append({**given, **outcome})
    return {"versions": VERSIONS, "now": NOW.isoformat(), "tokenizer": tokenizer_name, "special": special_tokens,
            "cases": golden}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(path.relative_to(HERE), path.stat().st_size)


def main():
    trained = {}
    for name, make in TOKENIZERS.items():
        trained[name] = make()
        write(HERE / "tokenizers" / f"{name}.json", json.loads(trained[name].to_str()))
        # From here on, as it reads back.
        trained[name] = Tokenizer.from_file(str(HERE / "tokenizers" / f"{name}.json"))
        write(HERE / "goldens" / f"tokenizer_{name}.json", tokenizer_golden(trained[name]))
    for name in FAMILIES:
        write(HERE / "goldens" / f"{name}.json", family_golden(name, trained))


if __name__ == "__main__":
    main()
