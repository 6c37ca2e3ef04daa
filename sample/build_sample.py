"""Build the sample: a small synthetic function-calling dataset and a tiny Gemma 3 model.

    python sample/build_sample.py                  # both, about 90 minutes on two CPU cores
    python sample/build_sample.py --resume         # continue an interrupted training of the model
    python sample/build_sample.py --only dataset   # a few seconds

hermes_sample.json has the row layout of NousResearch/hermes-function-calling-v1. Some of its tools
appear only in rows that step 1, with its default seed, puts into the test split.

tiny-gemma-3/ is a Gemma 3 text model. It takes the place of an instruction-tuned Gemma: it is
trained on general text only, from which it learns to read requests, copy values, fill in forms,
write JSON and markup, and chat. Its training text never contains the tags of the dataset, a tool
call, or the name of a tool that appears only in the test split.

The word lists and templates are in build_sample.json, which explains its own format. This file
has five parts: random values, the dataset, the general text, the model, and its training.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import Gemma3ForCausalLM, PreTrainedTokenizerFast

SAMPLE_DIR = Path(__file__).resolve().parent
DATA = json.loads((SAMPLE_DIR / "build_sample.json").read_text(encoding="utf-8"))
LISTS = DATA["words"] | DATA["phrases"]
EXCHANGES = DATA["exchanges"]
EVERYDAY_WORDS = LISTS["everyday_words"]
MORE_WORDS = LISTS["more_words"]
FIELD_KINDS = DATA["field_kinds"]
TOOL_KINDS = FIELD_KINDS | DATA["tool_kinds"]

Exchange = tuple[str, str]  # what the user says and what the model answers
Conversation = list[Exchange]
Record = dict[str, Any]  # values by the name of their field or parameter


# ---- Random values
# Every function takes values from the same random generator. An additional draw anywhere, or draws
# in another order, would change all texts that follow.


def choose(rng: Random, list_name: str, *values: object, **named_values: object) -> str:
    """Choose an entry of a list in build_sample.json and fill in its slots."""
    return rng.choice(LISTS[list_name]).format(*values, **named_values)


def choose_exchange(rng: Random, list_name: str, values: dict[str, object]) -> Exchange:
    """Choose an exchange of a list in build_sample.json and fill in its slots."""
    question, answer = rng.choice(EXCHANGES[list_name])
    return question.format(**values), answer.format(**values)


def invent_name(rng: Random) -> str:
    """Make up a pronounceable name. From such names, the model learns to copy unknown words."""
    num_syllables = rng.randint(1, 3)
    syllables = [choose(rng, "consonants") + choose(rng, "vowels") for _ in range(num_syllables)]
    return "".join(syllables).capitalize() + choose(rng, "name_endings")


def draw_date(rng: Random) -> str:
    if rng.random() < 0.5:
        return fill_template(rng, "{1-28} {months}")
    return fill_template(rng, "{2025-2029}-{01-12}-{01-28}")


def draw_email(rng: Random) -> str:
    return fill_template(rng, "{first_names}.{last_names}@{mail|post|box}.com").lower()


def draw_numbers(rng: Random) -> str:
    count = rng.randint(3, 4)
    return json.dumps([rng.randint(1, 99) for _ in range(count)])


# Slots that are not the name of a list, a range of numbers, or a choice of words.
SLOT_FUNCTIONS: dict[str, Callable[[Random], str]] = {
    "any_name": lambda rng: rng.choice([choose(rng, "first_names"), invent_name(rng)]),
    "invented_name": invent_name,
    "lower_name": lambda rng: invent_name(rng).lower(),
    "two_words": lambda rng: " ".join(rng.sample(EVERYDAY_WORDS, 2)),
    "two_joined_words": lambda rng: "_".join(rng.sample(EVERYDAY_WORDS, 2)),
    "three_words": lambda rng: " ".join(rng.sample(EVERYDAY_WORDS, 3)),
    "capitalized_word": lambda rng: rng.choice(EVERYDAY_WORDS).capitalize(),
    "record": lambda rng: json.dumps(draw_record(rng, 1, 3)),
    "nested_record": lambda rng: json.dumps(draw_nested_record(rng, depth=1)),
    "date": draw_date,
    "email": draw_email,
    "code": lambda rng: fill_template(rng, "{letters}{letters}{digits}"),
    "digits": lambda rng: fill_template(rng, "{0-9}" * rng.randint(3, 5)),
    "numbers": draw_numbers,
    "loan": lambda rng: str(500 * rng.randint(2, 90)),
}


def fill_template(rng: Random, template: str) -> str:
    """Fill in the slots of a template at random.

    {date} is what the function "date" in SLOT_FUNCTIONS returns, {6-23} is a number in that range,
    {cities} is an entry of that list, and {mail|post} is one of these words.
    """

    def fill_slot(match: re.Match[str]) -> str:
        slot = match[1]
        if slot in SLOT_FUNCTIONS:
            return SLOT_FUNCTIONS[slot](rng)
        if "-" in slot:
            low, high = slot.split("-")
            return str(rng.randint(int(low), int(high))).zfill(len(low))
        if slot in LISTS:
            return rng.choice(LISTS[slot])
        return rng.choice(slot.split("|"))

    return re.sub(r"{(.+?)}", fill_slot, template)


def draw_value(rng: Random, kind: dict) -> Any:
    """Draw a value of a kind. Its numbers read the same in a sentence and in JSON."""
    if "sample_from" in kind:
        count = rng.randint(2, 3)
        return rng.sample(LISTS[kind["sample_from"]], count)
    text = fill_template(rng, kind["template"])
    if kind["schema"]["type"] == "string":
        return text
    return json.loads(text)


def draw_field_value(rng: Random, kind: dict) -> Any:
    """Draw a value of a kind, and often replace a name with an invented one.

    Invented names teach the model to copy names instead of memorizing them.
    """
    value = draw_value(rng, kind)
    if not kind.get("is_name") or rng.random() >= 0.6:
        return value
    if isinstance(value, list):
        return [invent_name(rng) for _ in value]
    return " ".join(invent_name(rng) for _ in value.split())


def draw_fields(rng: Random, min_fields: int, max_fields: int) -> tuple[dict[str, dict], Record]:
    """Draw fields with different values. Return the kinds and the values, by field name."""
    kinds = {}
    values = {}
    for kind_name in rng.sample(sorted(FIELD_KINDS), rng.randint(min_fields, max_fields)):
        kind = FIELD_KINDS[kind_name]
        prefixed_name = f"{choose(rng, 'field_prefixes')}_{kind_name}"
        name = rng.choice([kind_name, kind_name, prefixed_name, rng.choice(EVERYDAY_WORDS)])
        value = draw_field_value(rng, kind)
        if str(value) not in [str(other) for other in values.values()]:
            kinds[name] = kind
            values[name] = value
    return kinds, values


def draw_record(rng: Random, min_fields: int, max_fields: int) -> Record:
    """Draw the values of fields, by field name."""
    _, values = draw_fields(rng, min_fields, max_fields)
    return values


def draw_nested_record(rng: Random, depth: int) -> Record:
    """Draw a record in which some values are records or lists of records."""
    record = draw_record(rng, 1, 3)
    if depth == 0:
        return record
    for name in rng.sample(EVERYDAY_WORDS, rng.randint(1, 2)):
        if rng.random() < 0.7:
            record[name] = draw_nested_record(rng, depth - 1)
        else:
            count = rng.randint(1, 3)
            record[name] = [draw_nested_record(rng, depth=0) for _ in range(count)]
    return record


# ---- Values and names in sentences and markup


def say(value: Any) -> str:
    """Write a value as in a sentence: ["a", "b", "c"] becomes "a, b and c"."""
    if not isinstance(value, list):
        return str(value)
    items = [str(item) for item in value]
    if len(items) == 1:
        return items[0]
    return ", ".join(items[:-1]) + " and " + items[-1]


def capitalize(text: str) -> str:
    """Capitalize the first letter. Unlike str.capitalize, do not change the other letters."""
    return text[0].upper() + text[1:]


def fix_articles(text: str) -> str:
    return re.sub(r"\ba (?=[aeiouAEIOU])", "an ", text)


def in_words(name: str) -> str:
    return name.replace("_", " ")


def list_facts(record: Record) -> list[str]:
    """Return ["the city is Rome", ...]."""
    return [f"the {in_words(name)} is {say(value)}" for name, value in record.items()]


def write_sentences(record: Record) -> str:
    return " ".join(f"{capitalize(fact)}." for fact in list_facts(record))


def write_lines(record: Record, margin: str = "") -> str:
    """Write one value per line. Nested records are indented."""
    lines = []
    for name, value in record.items():
        if isinstance(value, dict):
            lines.append(f"{margin}{name}:")
            lines.append(write_lines(value, margin + "  "))
        elif isinstance(value, list) and isinstance(value[0], dict):
            lines.append(f"{margin}{name}:")
            for item in value:
                lines.append(f"{margin}- {write_lines(item, margin + '  ').lstrip()}")
        else:
            lines.append(f"{margin}{name}: {say(value)}")
    return "\n".join(lines)


def wrap_in_tag(tag: str, text: str, on_own_lines: bool = False) -> str:
    """Write the text between tags, or without tags if the tag is empty."""
    if not tag:
        return text
    if on_own_lines:
        return f"<{tag}>\n{text}\n</{tag}>"
    return f"<{tag}>{text}</{tag}>"


# ---- Chats without tools
# These are in the dataset and in the general text, because an instruction-tuned Gemma can already
# chat before it is fine-tuned.


def draw_chat_values(rng: Random, kind: str) -> Record:
    """Draw the values for the slots of a chat of this kind."""
    if kind == "fact":
        return rng.choice(DATA["facts"])
    if kind == "list":
        list_names = ["foods", "products", "first_names", "topics", "rooms", "colors"]
        list_name = rng.choice(list_names)
        items = rng.sample(LISTS[list_name], rng.randint(3, 4))
        return {"said": say(items), "lines": "\n".join(f"- {item}" for item in items)}
    if kind == "compare":
        first, second = rng.sample(range(2, 999), 2)
        larger = max(first, second)
        smaller = min(first, second)
        return {"first": first, "second": second, "larger": larger, "smaller": smaller}
    if kind == "belongings":
        names = rng.sample(LISTS["first_names"], 3)
        things = rng.sample(LISTS["products"], 3)
        owner = rng.randrange(3)
        known = "".join(f"{names[i]} has a {things[i]}. " for i in range(3))
        return {"known": known, "name": names[owner], "thing": things[owner]}
    templates = DATA["chats"][kind]["values"]
    return {name: fill_template(rng, template) for name, template in templates.items()}


def draw_chat(rng: Random) -> Conversation:
    """Draw a chat about one to three subjects. Sometimes the user says thanks at the end."""
    exchanges = []
    kinds = ["fact", *DATA["chats"]]  # DATA["chats"] has "fact" too, so facts are twice as likely
    for kind in rng.sample(kinds, rng.randint(1, 3)):
        chat = DATA["chats"][kind]
        values = draw_chat_values(rng, kind)
        question = rng.choice(chat["questions"]).format(**values)
        exchanges.append((question, chat["answer"].format(**values)))
    if rng.random() < 0.2:
        exchanges.append((choose(rng, "thanks"), DATA["reply_to_thanks"]))
    return exchanges


# ---- The dataset

NUM_ROWS = 1000
TEST_SIZE = 0.2  # must be the test size of step 1
SPLIT_SEED = 42  # must be the default seed of step 1
TOOLS = DATA["tools"]
TEST_ONLY = set(DATA["test_only_tools"])

Turn = tuple[str, str]  # who speaks ("human", "gpt" or "tool") and the text

# Results that follow from the arguments. All other results are drawn at random.
COMPUTED_RESULTS: dict[str, Callable[..., Any]] = {
    "calculate_tip": lambda bill, percentage: round(bill * percentage / 100, 2),
    "calculate_discount": lambda price, percentage: round(price * (100 - percentage) / 100, 2),
    "calculate_loan": lambda amount, years, rate: round(
        amount * (1 + rate * years / 200) / years / 12, 2
    ),
    "calculate_bmi": lambda weight, height: round(weight / height**2, 1),
    "calculate_average": lambda numbers: round(sum(numbers) / len(numbers), 1),
    "calculate_area": lambda length, width: round(length * width, 2),
    "random_number": lambda low, high: (7 * low + 5 * high) // 12,
    "define_word": lambda word: DATA["definitions"][word],
    "search_products": lambda product, max_price: round(max_price * 0.9, 1),
}


class ToolRequest(NamedTuple):
    """A user's request for a tool."""

    text: str
    arguments: Record
    missing_parameter: str | None  # a required parameter that the text does not mention


def declare(tool: dict) -> dict:
    """Return the declaration of a tool, with its parameters as JSON schema."""
    properties = {name: TOOL_KINDS[kind]["schema"] for name, kind in tool["parameters"].items()}
    function = {
        "name": tool["name"],
        "description": tool["description"],
        "parameters": {
            "type": "object",
            "properties": properties,
            "required": tool["required"],
        },
    }
    return {"type": "function", "function": function}


def draw_arguments(rng: Random, tool: dict) -> Record:
    """Draw a different value for every parameter of a tool."""
    while True:
        arguments = {}
        for name, kind in tool["parameters"].items():
            arguments[name] = draw_value(rng, TOOL_KINDS[kind])
        if len({str(value) for value in arguments.values()}) == len(arguments):
            return arguments


def draw_request(rng: Random, tool: dict, leave_one_out: bool = False) -> ToolRequest:
    """Draw a request that contains all required arguments of a tool, or all but one."""
    num_missing = 1 if leave_one_out else 0
    candidates = []
    for template in tool["requests"]:
        slots = re.findall(r"{(\w+)}", template)
        missing = [name for name in tool["required"] if name not in slots]
        if len(missing) == num_missing:
            candidates.append((template, slots, missing))
    template, slots, missing = rng.choice(candidates)
    values = draw_arguments(rng, tool)
    text = template.removeprefix("?")
    text = text.format(**{name: say(value) for name, value in values.items()})
    text = choose(rng, "tool_questions" if template.startswith("?") else "tool_orders", text)
    text = fix_articles(capitalize(text)).replace("a headphones", "headphones")
    arguments = {name: value for name, value in values.items() if name in slots + missing}
    return ToolRequest(text, arguments, missing[0] if missing else None)


def call_tools(rng: Random, calls: list[tuple[dict, dict]]) -> list[Turn]:
    """Return the turns in which the model calls tools, they respond, and the model replies.

    `calls` are pairs of a tool and its arguments.
    """
    call_blocks = []
    response_blocks = []
    replies = []
    for tool, arguments in calls:
        result = {name: draw_value(rng, TOOL_KINDS[kind]) for name, kind in tool["result"].items()}
        if tool["name"] in COMPUTED_RESULTS:
            result[tool["computed_result"]] = COMPUTED_RESULTS[tool["name"]](**arguments)
        call = json.dumps({"name": tool["name"], "arguments": arguments})
        response = json.dumps({"name": tool["name"], "content": result})
        call_blocks.append(wrap_in_tag("tool_call", call, on_own_lines=True))
        response_blocks.append(wrap_in_tag("tool_response", response, on_own_lines=True))
        values = {name: say(value) for name, value in {**arguments, **result}.items()}
        replies.append(tool["reply"].format(**values))
    return [
        ("gpt", "\n".join(call_blocks)),
        ("tool", "\n".join(response_blocks)),
        ("gpt", " ".join(replies)),
    ]


def refuse(rng: Random, declared: list[dict], undeclared: list[dict]) -> list[Turn]:
    """Draw a request for a tool that is not declared. The model lists the tools that it has."""
    request = draw_request(rng, rng.choice(undeclared))
    abilities = [tool["description"][0].lower() + tool["description"][1:] for tool in declared]
    answer = f"I'm sorry, but I have no function for that. I can only {say(abilities)}."
    return [("human", request.text), ("gpt", answer)]


def ask_for_missing_value(rng: Random, tool: dict) -> list[Turn]:
    """Draw a request without a required argument. The model asks for it and then calls the tool."""
    request = draw_request(rng, tool, leave_one_out=True)
    kind = TOOL_KINDS[tool["parameters"][request.missing_parameter]]
    value = request.arguments[request.missing_parameter]
    turns = [
        ("human", request.text),
        ("gpt", f"Gladly. {kind['question']}?"),
        ("human", choose(rng, "tool_value_answers", say(value))),
    ]
    return turns + call_tools(rng, [(tool, request.arguments)])


def request_calls(rng: Random, tools: list[dict]) -> list[Turn]:
    """Draw one user turn that requests a call of each tool. No two calls are the same."""
    while True:
        requests = [draw_request(rng, tool) for tool in tools]
        calls = [(tool, request.arguments) for tool, request in zip(tools, requests, strict=True)]
        if len(calls) == 1 or calls[0] != calls[1]:
            break
    text = " ".join(request.text for request in requests)
    return [("human", text), *call_tools(rng, calls)]


def draw_turns(rng: Random, kind: str, declared: list[dict], undeclared: list[dict]) -> list[Turn]:
    """Draw the turns of one entry of a row plan."""
    tool = rng.choice(declared)
    if kind == "no tool":
        return refuse(rng, declared, undeclared)
    if kind == "question":
        return ask_for_missing_value(rng, tool)
    if kind == "call":
        return request_calls(rng, [tool])
    # The plan says "several calls": of two tools, or of one tool twice.
    if len(declared) > 1 and rng.random() < 0.5:
        return request_calls(rng, rng.sample(declared, 2))
    return request_calls(rng, [tool, tool])


def make_row(number: int, system_prompt: str, turns: list[Turn], tools: str, category: str) -> dict:
    """Return a row with the columns of the published dataset."""
    conversation = [("system", system_prompt), *turns]
    return {
        "id": f"sample-{number:04}",
        "conversations": [{"from": role, "value": text} for role, text in conversation],
        "tools": tools,
        "category": category,
        "subcategory": "",
        "task": "",
    }


def make_chat_row(rng: Random, number: int) -> dict:
    """Make a row without tools."""
    while True:
        exchanges = draw_chat(rng)
        questions = {question for question, _ in exchanges}
        if len(questions) == len(exchanges):  # the user asks every question only once
            break
    turns = []
    for question, answer in exchanges:
        turns += [("human", question), ("gpt", answer)]
    return make_row(number, DATA["system_prompt_without_tools"], turns, "null", "Chat")


def make_tool_row(rng: Random, number: int, main_tool: dict, tools: list[dict]) -> dict:
    """Make a row that declares `main_tool` and up to two others of `tools`."""
    others = [tool for tool in tools if tool is not main_tool]
    rng.shuffle(others)
    num_others = rng.choice([0, 0, 0, 0, 0, 1, 1, 1, 2])
    declared = [main_tool, *others[:num_others]]
    undeclared = others[num_others:]
    turns = []
    for kind in rng.choice(DATA["row_plans"]):
        # A row that begins with a call begins with a call of the main tool.
        is_first_call = not turns and kind in ("call", "question")
        callable_tools = [main_tool] if is_first_call else declared
        turns += draw_turns(rng, kind, callable_tools, undeclared)
    turns[0] = ("human", choose(rng, "greetings") + turns[0][1])
    if rng.random() < 0.2:
        turns += [("human", choose(rng, "thanks")), ("gpt", DATA["reply_to_thanks"])]
    rng.shuffle(declared)
    declarations = json.dumps([declare(tool) for tool in declared])
    system_prompt = "".join(DATA["system_prompt_with_tools"]).format(tools=declarations)
    return make_row(number, system_prompt, turns, declarations, main_tool["category"])


def build_dataset(path: Path, seed: int) -> None:
    """Write the dataset. Test-only tools appear only in rows that step 1 puts into test."""
    import datasets

    datasets.disable_progress_bars()
    numbers = datasets.Dataset.from_dict({"row": range(NUM_ROWS)})
    splits = numbers.train_test_split(test_size=TEST_SIZE, seed=SPLIT_SEED)
    test_rows = set(splits["test"]["row"])
    train_tools = [tool for tool in TOOLS if tool["name"] not in TEST_ONLY]
    test_tools = [tool for tool in TOOLS if tool["name"] in TEST_ONLY]
    rng = Random(seed)
    rows = []
    for number in range(NUM_ROWS):
        is_test = number in test_rows
        main_tools = rng.choice([train_tools, test_tools]) if is_test else train_tools
        if rng.random() < 0.82:
            tools = TOOLS if is_test else train_tools
            row = make_tool_row(rng, number, rng.choice(main_tools), tools)
        else:
            row = make_chat_row(rng, number)
        rows.append(json.dumps(row, ensure_ascii=False))
    path.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


# ---- General text: forms
# A form resembles a tool: it has a title, a description and fields. The user shows forms and then
# asks for one of them. The model answers with the title and the values from the request.

Style = tuple[str, str]  # an instruction, and the template of the answers that follow it
AnswerWriter = Callable[[str, Record], str]  # writes the title and the values of a form
PLAIN_STYLE: Style = ("", "Form {title}\n{record}")


@dataclass
class Form:
    """A form, and the values for a request."""

    title: str
    intent: str | None  # what users ask for instead of the title
    noun: str
    description: str
    kinds: dict[str, dict]  # by field name
    values: Record
    required: list[str]


def draw_simple_form(rng: Random) -> Form:
    """Draw a form that users ask for by its title."""
    nouns = [choose(rng, "form_nouns"), choose(rng, "form_nouns"), rng.choice(EVERYDAY_WORDS)]
    noun = rng.choice([*nouns, invent_name(rng).lower()])
    if rng.random() < 0.5:
        title = f"{noun}_{choose(rng, 'form_words')}"
    else:
        title = f"{choose(rng, 'form_verbs')}_{noun}"
    kinds, values = draw_fields(rng, 1, 4)
    required = [name for name in kinds if rng.random() < 0.85]
    description = capitalize(choose(rng, "form_purposes", in_words(title)))
    return Form(title, None, noun, description, kinds, values, required)


def draw_varied_form(rng: Random) -> Form:
    """Draw a form that users ask for without its title. Several forms can share a verb."""
    words = {
        "verb": choose(rng, "common_verbs"),
        "noun": rng.choice(MORE_WORDS),
        "whose": rng.choice([*MORE_WORDS, *EVERYDAY_WORDS]),
    }
    title = choose(rng, "form_titles", **words)
    description = capitalize(fix_articles(choose(rng, "form_descriptions", **words)))
    intent = choose(rng, "form_intents", **words)
    kinds, values = draw_fields(rng, 1, 3)
    required = [name for name in kinds if rng.random() < 0.9]
    return Form(title, intent, words["noun"], description, kinds, values, required)


def draw_form(rng: Random, varied: bool) -> Form:
    return draw_varied_form(rng) if varied else draw_simple_form(rng)


def write_schema(rng: Random, form: Form) -> dict:
    """Return the fields of a form as JSON schema. Some have no description."""
    properties = {}
    for name, kind in form.kinds.items():
        properties[name] = dict(kind["schema"])
        if name in FIELD_KINDS and rng.random() >= 0.8:
            del properties[name]["description"]
    return {"type": "object", "properties": properties, "required": form.required}


def write_request(rng: Random, form: Form, values: Record) -> str:
    """Write a user's request for a form, with these values in a random order."""
    phrases = []
    for name, value in values.items():
        if rng.random() < 0.65 and name.split("_")[0] not in LISTS["field_prefixes"]:
            phrases.append(rng.choice(form.kinds[name]["phrases"]).format(say(value)))
        else:
            phrases.append(choose(rng, "field_phrases", in_words(name), say(value)))
    rng.shuffle(phrases)
    if form.intent:
        phrases.insert(0 if rng.random() < 0.8 else len(phrases), form.intent)
        is_order = form.intent.split()[0] in LISTS["common_verbs"]
        text = choose(rng, "form_orders" if is_order else "form_questions", " ".join(phrases))
        return capitalize(fix_articles(text))
    separator = rng.choice([" ", " ", ", "])
    opening = choose(rng, "form_openings", in_words(form.title))
    if rng.random() < 0.25:
        opening = choose(rng, "form_subjects", form.noun)
    text = capitalize(f"{opening} {separator.join(phrases)}".strip())
    return text + ("?" if opening.startswith("Can you") else ".")


def draw_form_exchanges(
    rng: Random,
    forms: list[Form],
    varied: bool,
    write_answer: AnswerWriter,
) -> list[Exchange]:
    """Draw a request and its answer: one or two filled-in forms, a question, or a refusal."""
    form = rng.choice(forms)
    said = [name for name in form.values if name in form.required or rng.random() < 0.5]
    values = {name: form.values[name] for name in said}
    answer = write_answer(form.title, values)
    chance = rng.random()
    if chance < 0.12:
        other = draw_form(rng, varied)
        titles = " and ".join(in_words(form.title) for form in forms)
        refusal = f"I'm sorry, none of my forms fits. I only have {titles}."
        return [(write_request(rng, other, other.values), refusal)]
    if chance < 0.27 and form.required:
        missing = rng.choice(form.required)
        value = values.pop(missing)
        question = f"{form.kinds[missing]['question']} is it?"
        return [
            (write_request(rng, form, values), question),
            (choose(rng, "form_value_answers", say(value)), answer),
        ]
    if chance < 0.42:
        second = rng.choice(forms)
        second_values = {
            name: draw_field_value(rng, second.kinds[name]) for name in second.required
        }
        request = write_request(rng, form, values)
        second_request = write_request(rng, second, second_values)
        second_answer = write_answer(second.title, second_values)
        return [(f"{request} {second_request}", f"{answer}\n{second_answer}")]
    return [(write_request(rng, form, values), answer)]


def start_with(text: str, exchanges: Conversation) -> Conversation:
    """Put a text at the beginning of what the user says first."""
    question, answer = exchanges[0]
    return [(text + question, answer), *exchanges[1:]]


def draw_form_conversation(
    rng: Random,
    varied: bool,
    instruction: str,
    write_answer: AnswerWriter,
    show_forms: Callable[[list[dict]], str] = json.dumps,
) -> Conversation:
    """Draw forms and one to four requests for them.

    `instruction` tells the model how to answer. `show_forms` writes the forms for the model to
    read.
    """
    num_forms = rng.choice([1, 2, 2, 2, 3, 3] if varied else [1, 1, 2, 2, 3])
    forms = [draw_form(rng, varied) for _ in range(num_forms)]
    schemas = [write_schema(rng, form) for form in forms]
    is_nested = varied and rng.random() < 0.7
    shown = []
    for form, schema in zip(forms, schemas, strict=True):
        head = {"title": form.title, "description": form.description}
        if is_nested:
            shown.append({"kind": "form", "form": {**head, "fields": schema}})
        else:
            shown.append({**head, **schema})
    start = choose(rng, "form_starts", show_forms(shown)) + instruction
    exchanges = []
    for _ in range(rng.randint(1, 4)):
        exchanges += draw_form_exchanges(rng, forms, varied, write_answer)
        for form in forms:  # the next request has other values
            form.values = {name: draw_field_value(rng, kind) for name, kind in form.kinds.items()}
    return start_with(start, exchanges)


def draw_forms(rng: Random, varied: bool, style: Style) -> Conversation:
    """Draw a conversation about forms in which the model answers in this style."""
    instruction, template = style

    def write_answer(title: str, values: Record) -> str:
        return template.format(
            title=title,
            record=json.dumps(values),
            lines=write_lines(values),
            object=json.dumps({"title": title, **values}),
        )

    return draw_form_conversation(rng, varied, instruction, write_answer)


def draw_simple_forms(rng: Random) -> Conversation:
    return draw_forms(rng, varied=False, style=PLAIN_STYLE)


def draw_varied_forms(rng: Random) -> Conversation:
    return draw_forms(rng, varied=True, style=PLAIN_STYLE)


def draw_styled_forms(rng: Random) -> Conversation:
    style = rng.choice(EXCHANGES["form_styles"])
    return draw_forms(rng, varied=True, style=style)


# ---- General text: records and copying


def draw_record_questions(rng: Random) -> Conversation:
    """Draw a record in JSON and questions about it."""
    kinds, record = draw_fields(rng, 2, 5)
    exchanges = []
    for name in rng.sample(sorted(record), min(len(record), rng.randint(1, 5))):
        values = {
            "words": in_words(name),
            "value": say(record[name]),
            "other": say(draw_field_value(rng, kinds[name])),
        }
        exchanges.append(choose_exchange(rng, "record", values))
    if rng.random() < 0.4:
        exchanges = [("Tell me all of it.", write_sentences(record))]
    return start_with(json.dumps(record) + "\n", exchanges)


def draw_conversion(rng: Random) -> Conversation:
    """Draw a record to rewrite: from a sentence or lines to JSON, or from JSON to them."""
    record = draw_record(rng, 1, 5)
    values = {
        "record": json.dumps(record),
        "lines": write_lines(record),
        "facts": ", ".join(list_facts(record)),
    }
    return [choose_exchange(rng, "to_json", values)]


def draw_item(rng: Random, list_name: str) -> str:
    """Draw a text for the model to copy. Most of these texts never occur twice."""
    return rng.choice([fill_template(rng, template) for template in LISTS[list_name]])


def draw_copying(rng: Random) -> Conversation:
    """Draw words, names and numbers to copy, or name-value pairs in which to find one value."""
    items = [draw_item(rng, "copy_items") for _ in range(rng.randint(2, 8))]
    chosen = rng.randrange(len(items))
    if rng.random() < 0.4:
        names = [invent_name(rng) for _ in items]
        pairs = "; ".join(f"{name} is {item}" for name, item in zip(names, items, strict=True))
        question = choose(rng, "lookup_questions", pairs=pairs, name=names[chosen])
        return [(question, items[chosen])]
    values = {"listed": ", ".join(items), "joined": " ".join(items), "array": json.dumps(items)}
    return [choose_exchange(rng, "copy", values)]


# ---- General text: markup
# An instruction-tuned Gemma knows markup, but not the tags of the dataset. So these texts use tags
# of random words.


def draw_tag(rng: Random) -> str:
    """Draw the name of a tag: one to three words."""
    separator = rng.choice("___-")
    words = rng.choice([EVERYDAY_WORDS, MORE_WORDS])
    num_words = rng.choice([1, 1, 2, 2, 3])
    return separator.join(rng.sample(words, num_words))


def draw_key_pair(rng: Random) -> list[str]:
    """Draw two keys of a JSON object, such as "title" and "values"."""
    return rng.choice([*DATA["key_pairs"], rng.sample(EVERYDAY_WORDS, 2)])


def arrange(layout: str, first: str, second: str, title: str, values: dict) -> dict | list:
    """Arrange the title and the values of a form as a layout in build_sample.json describes."""
    if layout == "title, values":
        return {first: title, second: values}
    if layout == "values, title":
        return {second: values, first: title}
    if layout == "title as key":
        return {title: values}
    if layout == "both under one key":
        return {first: {"title": title, second: values}}
    return [title, values]


def draw_tagged_forms(rng: Random) -> Conversation:
    """Draw forms that the model fills in as nested JSON, usually in tags."""
    tag = draw_tag(rng)
    form_tag = draw_tag(rng)
    on_own_lines = rng.random() < 0.7
    first, second = draw_key_pair(rng)
    layout, description = rng.choice(DATA["answer_layouts"])
    lines_note = choose(rng, "own_lines_notes") if on_own_lines else ""
    instruction, tag_template = rng.choice(EXCHANGES["tagged_form_styles"])
    instruction = instruction.format(
        what=description.format(first=first, second=second),
        tag=tag,
        lines=lines_note,
        example=wrap_in_tag(tag, "...", on_own_lines),
    )
    list_tag = rng.choice(["", form_tag])
    has_tag_per_form = rng.random() < 0.1

    def write_answer(title: str, values: Record) -> str:
        answer = json.dumps(arrange(layout, first, second, title, values))
        return wrap_in_tag(tag_template.format(tag=tag, title=title), answer, on_own_lines)

    def show_forms(forms: list[dict]) -> str:
        if not has_tag_per_form:
            return wrap_in_tag(list_tag, json.dumps(forms), on_own_lines)
        return "\n".join(wrap_in_tag(form_tag, json.dumps(form), on_own_lines) for form in forms)

    varied = rng.random() < 0.7
    return draw_form_conversation(rng, varied, instruction, write_answer, show_forms)


def draw_blocks(rng: Random) -> Conversation:
    """Draw blocks of text in tags, and requests to read one, change its tags, or remove them."""
    on_own_lines = rng.random() < 0.5
    separator = rng.choice(["\n", "\n", "\n\n", " "])
    tags = [draw_tag(rng) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.3:
        tags = [tags[0]] * len(tags)
    bodies = [draw_item(rng, "markup_items") for _ in tags]
    blocks = []
    for tag, body in zip(tags, bodies, strict=True):
        blocks.append(wrap_in_tag(tag, body, on_own_lines))
    all_blocks = separator.join(blocks)
    start = choose(rng, "block_starts", all_blocks)
    chosen = rng.randrange(len(tags))
    other_tag = draw_tag(rng)
    values = {
        "place": LISTS["ordinals"][chosen],
        "tag": tags[chosen],
        "other": other_tag,
        "body": bodies[chosen],
        "block": blocks[chosen],
        "count": len(blocks),
        "blocks": all_blocks,
        "bodies": separator.join(bodies),
        "renamed": wrap_in_tag(other_tag, bodies[chosen], on_own_lines),
        "wrapped": wrap_in_tag(other_tag, all_blocks, on_own_lines=True),
    }
    candidates = EXCHANGES["blocks"]
    if tags.count(tags[chosen]) == 1:
        candidates = candidates + EXCHANGES["blocks_by_tag"]
    exchanges = []
    for question, answer in rng.sample(candidates, rng.randint(1, 3)):
        exchanges.append((question.format(**values), answer.format(**values)))
    return start_with(start, exchanges)


def draw_wrapping(rng: Random) -> Conversation:
    """Draw one or more texts for the model to put in tags."""
    tag = draw_tag(rng)
    on_own_lines = rng.random() < 0.5
    items = [draw_item(rng, "markup_items") for _ in range(rng.randint(1, 4))]
    lines_note = choose(rng, "own_lines_notes") if on_own_lines else ""
    list_name = "wrap_each" if len(items) > 1 else "wrap_one"
    question = choose(rng, list_name, items="\n".join(items), tag=tag, lines=lines_note)
    return [(question, "\n".join(wrap_in_tag(tag, item, on_own_lines) for item in items))]


def draw_tagged_records(rng: Random) -> Conversation:
    """Draw records in tags, or with each value in tags, to describe, rewrite or ask about.

    In one of four conversations, the first turn announces the records and the model describes each.
    """
    tag = draw_tag(rng)
    on_own_lines = rng.random() < 0.6
    is_announced = rng.random() < 0.25
    exchanges = []
    if is_announced:
        request = f"I send you records in <{tag}> tags. Tell me what stands in them."
        exchanges.append((request, "Yes. Send me the first one."))
    num_records = rng.randint(1, 3) if is_announced else 1
    for _ in range(num_records):
        record = draw_record(rng, 1, 4)
        as_json = wrap_in_tag(tag, json.dumps(record), on_own_lines)
        value_lines = [wrap_in_tag(name, say(value)) for name, value in record.items()]
        as_tags = wrap_in_tag(tag, "\n".join(value_lines), on_own_lines=True)
        shown = rng.choice([as_json, as_tags])
        if is_announced:
            exchanges.append((shown, write_sentences(record)))
            continue
        name = rng.choice(list(record))
        values = {
            "tag": tag,
            "lines": ", on lines of their own" if on_own_lines else "",
            "record": json.dumps(record),
            "plain": write_lines(record),
            "facts": ", ".join(list_facts(record)),
            "sentences": write_sentences(record),
            "as_json": as_json,
            "as_tags": as_tags,
            "shown": shown,
            "words": in_words(name),
            "value": say(record[name]),
            "own": wrap_in_tag(name, say(record[name])),
        }
        exchanges.append(choose_exchange(rng, "tagged_record", values))
    return exchanges


def draw_nesting(rng: Random) -> Conversation:
    """Draw nested JSON, sometimes in tags, for the model to write, copy, change or read."""
    depth = rng.choice([1, 1, 2])
    record = draw_nested_record(rng, depth)
    tag = draw_tag(rng)
    on_own_lines = rng.random() < 0.7
    tag = tag if rng.random() < 0.5 else ""
    tag_note = f" in <{tag}> tags" if tag else ""
    if tag and on_own_lines:
        tag_note += ", on lines of their own"
    key = rng.choice(list(record))
    first, second = draw_key_pair(rng)
    title = rng.choice([invent_name(rng), "_".join(rng.sample(EVERYDAY_WORDS, 2))])
    parts = [draw_record(rng, 1, 2) for _ in range(rng.randint(2, 3))]
    merged = {}
    part_texts = []
    for part in parts:
        merged.update(part)
        part_texts.append(", ".join(f"{name} {say(value)}" for name, value in part.items()))

    def write(value: Any) -> str:
        return wrap_in_tag(tag, json.dumps(value), on_own_lines)

    values = {
        "record": json.dumps(record),
        "lines": write_lines(record),
        "inside": tag_note,
        "key": key,
        "first": first,
        "second": second,
        "title": title,
        "in_one": ", ".join(part_texts),
        "in_parts": "; ".join(part_texts),
        "wrapped": write(record),
        "part": write(record[key]),
        "listed": write({second: parts}),
        "beside": write({first: title, second: record}),
        "merged": write({first: title, second: merged}),
    }
    return [choose_exchange(rng, "nested", values)]


# ---- General text: the mixture

# How often each kind of conversation is drawn, relative to the others.
TextWeights = dict[Callable[[Random], Conversation], int]
BASIC_TEXTS: TextWeights = {
    draw_simple_forms: 11,
    draw_record_questions: 3,
    draw_conversion: 4,
    draw_copying: 3,
    draw_chat: 3,
}
VARIED_TEXTS: TextWeights = {draw_varied_forms: 16, **BASIC_TEXTS}
STYLED_TEXTS: TextWeights = {draw_styled_forms: 30, **BASIC_TEXTS}
MARKUP_TEXTS: TextWeights = {
    draw_tagged_forms: 26,
    draw_blocks: 7,
    draw_wrapping: 4,
    draw_tagged_records: 8,
    draw_nesting: 7,
    **STYLED_TEXTS,
}

# The model must not see these before it is fine-tuned: the tags of the dataset, the tools that
# appear only in the test split, and the keys "name" and "arguments" together, as in a call.
HELD_BACK = re.compile(
    rf"</?(tools|think)>|\b({'|'.join(sorted(TEST_ONLY))}|tool_call|tool_response)\b"
    r'|"name": .*"arguments": |"arguments": .*"name": ',
    re.DOTALL,
)


def general_text(seed: int | str, texts: TextWeights = BASIC_TEXTS) -> Iterator[Conversation]:
    """Yield an endless stream of conversations, the same for the same seed. None is HELD_BACK."""
    rng = Random(seed)
    while True:
        [draw_conversation] = rng.choices(list(texts), list(texts.values()))
        conversation = draw_conversation(rng)
        texts_of_turns = [text for exchange in conversation for text in exchange]
        if not any(HELD_BACK.search(text) for text in texts_of_turns):
            yield conversation


# ---- The tokenizer and the model

VOCABULARY_SIZE = 3072
UNUSED_TOKENS = [f"<unused{number}>" for number in range(16)]
START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"
CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

# Text is split into these pieces before byte pairs are merged: a digit, a word, a run of
# punctuation, a space. A lowercase word includes the space before it. A capitalized word does not,
# because a name must have the same tokens in a sentence and in JSON.
PIECES = r"\d|[A-Z][a-z]*| ?[a-z]+|[^\sA-Za-z0-9]+(?: [^\sA-Za-z0-9]+)*|\s"


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the general text, with Gemma's special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    named_tokens = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[*named_tokens, *UNUSED_TOKENS, START_OF_TURN, END_OF_TURN],
        show_progress=False,
    )
    conversations = islice(general_text(seed), 30_000)
    texts = [text for exchanges in conversations for exchange in exchanges for text in exchange]
    # Each of these words becomes a token of its own.
    words = EVERYDAY_WORDS + LISTS["form_nouns"]
    texts += [f'a {word} "{word}"' for word in words] * 100
    tokenizer.train_from_iterator(texts, trainer)
    # Fine-tuning may assign text to the unused tokens. Decoding must not skip them then, so they
    # are not special tokens.
    definition = json.loads(tokenizer.to_str())
    for token in definition["added_tokens"]:
        token["special"] = token["content"] not in UNUSED_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)),
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Gemma3ForCausalLM:
    """Make a small Gemma 3 text model with random weights."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig

    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        layer_types=[
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
            "full_attention",
        ],
    )
    model = Gemma3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


# ---- Training


class Stage(NamedTuple):
    """A part of the training with its own peak learning rate and mixture of texts."""

    num_steps: int
    learning_rate: float
    share_of_short_rows: float
    texts: TextWeights


# Training begins with short rows: the model learns to copy earlier when the text to copy is near.
STAGES = [
    Stage(5000, 6e-3, 0.24, BASIC_TEXTS),
    Stage(1700, 3e-3, 0.0, VARIED_TEXTS),
    Stage(1200, 3e-3, 0.0, STYLED_TEXTS),
    Stage(1800, 3e-3, 0.0, MARKUP_TEXTS),
]
SHORT_ROWS = (16, 256)  # rows per batch, tokens per row
LONG_ROWS = (8, 640)
WARMUP_STEPS = 100
STEPS_PER_CHECKPOINT = 200
STEPS_PER_LOG = 100


def encode(
    tokenizer: PreTrainedTokenizerFast, conversation: Conversation
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation, and whether each token is part of an answer."""
    token_ids = [tokenizer.bos_token_id]
    is_answer = [False]
    for question, answer in conversation:
        before = f"{START_OF_TURN}user\n{question}{END_OF_TURN}\n{START_OF_TURN}model\n"
        texts = [before, f"{answer}{END_OF_TURN}", "\n"]
        before_ids, answer_ids, after_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        token_ids += before_ids + answer_ids + after_ids
        is_answer += [False] * len(before_ids) + [True] * len(answer_ids) + [False] * len(after_ids)
    return token_ids, is_answer


def make_batch(
    tokenizer: PreTrainedTokenizerFast,
    conversations: Iterator[Conversation],
    num_rows: int,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill rows with whole conversations, until 30 of them do not fit into any row.

    Returns the token ids and whether each token is part of an answer, both of shape
    (num_rows, length).
    """
    import torch

    id_rows = [[] for _ in range(num_rows)]
    is_answer_rows = [[] for _ in range(num_rows)]
    num_misfits = 0
    while num_misfits < 30:
        token_ids, is_answer = encode(tokenizer, next(conversations))
        for id_row, is_answer_row in zip(id_rows, is_answer_rows, strict=True):
            if len(id_row) + len(token_ids) <= length:
                id_row += token_ids
                is_answer_row += is_answer
                break
        else:
            num_misfits += 1
    for id_row, is_answer_row in zip(id_rows, is_answer_rows, strict=True):
        num_padding = length - len(id_row)
        id_row += [tokenizer.pad_token_id] * num_padding
        is_answer_row += [False] * num_padding
    return torch.tensor(id_rows), torch.tensor(is_answer_rows)


def make_optimizers(model: Gemma3ForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the weight matrices of the layers, and AdamW for all other weights."""
    import torch

    matrices = []
    others = []
    for name, weight in model.named_parameters():
        is_matrix = weight.ndim == 2 and "embed" not in name
        (matrices if is_matrix else others).append(weight)
    muon = torch.optim.Muon(
        matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


def load_checkpoint(path: Path, seed: int, resume: bool) -> dict | None:
    """Load the checkpoint of an interrupted training, or exit if it must not be used."""
    import torch

    if not path.exists():
        return None
    if not resume:
        sys.exit(
            f"error: {path} is the checkpoint of an interrupted training: use --resume to "
            "continue it, or delete the file to start over"
        )
    checkpoint = torch.load(path, weights_only=True)
    if checkpoint["seed"] != seed:
        sys.exit(
            f"error: cannot resume: {path} was started with --seed {checkpoint['seed']}, not "
            f"{seed}: use the original seed, or delete the file to start over"
        )
    return checkpoint


def save_checkpoint(
    path: Path,
    seed: int,
    step: int,
    model: Gemma3ForCausalLM,
    optimizers: list[torch.optim.Optimizer],
) -> None:
    """Replace the checkpoint. If this is interrupted, the previous checkpoint remains."""
    import torch

    checkpoint = {
        "seed": seed,
        "step": step,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    unfinished = path.with_name(f"{path.name}.unfinished")
    torch.save(checkpoint, unfinished)
    unfinished.replace(path)


def compute_loss(
    model: Gemma3ForCausalLM,
    transformer: Callable[..., Any],
    token_ids: torch.Tensor,
    is_answer: torch.Tensor,
    use_bfloat16: bool,
) -> torch.Tensor:
    """Return the mean cross-entropy of the tokens of answers.

    `transformer` is the model without its output layer, compiled where possible. The logits of
    other tokens are not computed.
    """
    import torch

    is_target = is_answer[:, 1:]
    with torch.autocast(token_ids.device.type, torch.bfloat16, enabled=use_bfloat16):
        hidden = transformer(input_ids=token_ids, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[is_target])
    return torch.nn.functional.cross_entropy(logits.float(), token_ids[:, 1:][is_target])


def train_model(folder: Path, seed: int, resume: bool) -> None:
    """Train the tiny Gemma on the general text and save it in `folder`.

    In each stage, the learning rate is constant after the warm-up until half of the steps are done,
    and then decays linearly to zero. The text of a step depends only on the seed and the step, so a
    resumed training sees the same text as an uninterrupted one.
    """
    import torch

    checkpoint_path = folder.with_name(f"{folder.name}-checkpoint.pt")
    checkpoint = load_checkpoint(checkpoint_path, seed, resume)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Without hardware support, bfloat16 is slower than float32.
    use_bfloat16 = device == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    model = build_model(tokenizer).to(device)
    transformer = model.model
    if sys.platform == "linux" and shutil.which("g++"):  # torch.compile needs a compiler
        transformer = torch.compile(model.model, dynamic=False)
    first_step = 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        first_step = checkpoint["step"]
    schedule = [(stage, step) for stage in STAGES for step in range(stage.num_steps)]
    for number in range(first_step, len(schedule)):
        stage, step = schedule[number]
        if step == 0 or number == first_step:
            optimizers = make_optimizers(model, stage.learning_rate)
            if step > 0:  # the training was interrupted in the middle of a stage
                for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                    optimizer.load_state_dict(state)
        has_short_rows = step < stage.share_of_short_rows * stage.num_steps
        num_rows, length = SHORT_ROWS if has_short_rows else LONG_ROWS
        conversations = general_text(f"{seed}-{number}", stage.texts)
        token_ids, is_answer = make_batch(tokenizer, conversations, num_rows, length)
        token_ids = token_ids.to(device)
        is_answer = is_answer.to(device)
        loss = compute_loss(model, transformer, token_ids, is_answer, use_bfloat16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = min(1.0, (step + 1) / WARMUP_STEPS, 2 * (1 - step / stage.num_steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * scale
            optimizer.step()
            optimizer.zero_grad()
        if (number + 1) % STEPS_PER_LOG == 0:
            print(f"step {number + 1:,} of {len(schedule):,}: loss {loss.item():.3f}", flush=True)
        if (number + 1) % STEPS_PER_CHECKPOINT == 0:
            save_checkpoint(checkpoint_path, seed, number + 1, model, optimizers)
    model.cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    checkpoint_path.unlink(missing_ok=True)


# ---- Command line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Build the sample: a small synthetic function-calling dataset and a tiny "
        "Gemma 3 model.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--only",
        choices=["dataset", "model"],
        help="build only the dataset (seconds) or only the model (about 90 minutes on two CPU "
        "cores); default: both",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        help="random seed of the dataset and the model (default: 1, as in the repository)",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=SAMPLE_DIR,
        help="folder for the results, which replace existing ones (default: sample/)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted training of the model from its last checkpoint",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.only != "model":
        dataset_path = args.output_dir / "hermes_sample.json"
        build_dataset(dataset_path, args.seed)
        print(f"Dataset  {dataset_path}")
    if args.only != "dataset":
        model_dir = args.output_dir / "tiny-gemma-3"
        train_model(model_dir, args.seed, args.resume)
        print(f"Model    {model_dir}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: to continue the training of the model, run this with --resume")
