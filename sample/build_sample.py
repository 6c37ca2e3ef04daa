"""Make the sample anew from a seed: a small function-calling dataset, and a small Gemma 3 that
cannot call functions yet. What their texts are made of is in build_sample.json.

    python sample/build_sample.py                  # both: some 90 minutes on two cores
    python sample/build_sample.py --resume         # go on with an interrupted model
    python sample/build_sample.py --only dataset   # seconds

hermes_sample.json has the row layout of NousResearch/hermes-function-calling-v1. Some of its tools
stand only in rows that step 1, with its own seed, draws for the test split. tiny-gemma-3/ is a
Gemma 3 text model trained on general text: it reads requests, copies values, fills in forms, writes
JSON and markup, and chats in Gemma's turns. It never saw one of the dataset's tags, the form of a
call, or one of those tools: it stands where an instruction-tuned Gemma stands.
"""

import argparse
import json
import random
import re
import shutil
import sys
from collections import namedtuple
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
DATA = json.loads((HERE / "build_sample.json").read_text(encoding="utf-8"))
LISTS, EXCHANGES = DATA["words"] | DATA["phrases"], DATA["exchanges"]
PLAIN_STYLE = ["", "Form {title}\n{record}"]  # no instruction, and how a form is filled in
EVERYDAY_WORDS, MORE_WORDS = LISTS["everyday_words"], LISTS["more_words"]
KINDS = DATA["kinds"]  # what a parameter or a field can be
TOOL_KINDS = KINDS | DATA["tool_kinds"]

# ---- Values: what people ask with, written alike in a request and in a call


def pick(rng, name, /, *values, **named_values):
    """One of a list of the data, with the values in its slots."""
    return rng.choice(LISTS[name]).format(*values, **named_values)


def pick_exchange(rng, name, /, **values):
    """What the user and the model say, of a list of the data."""
    return tuple(text.format(**values) for text in rng.choice(EXCHANGES[name]))


def invent_name(rng):
    """A pronounceable name that nobody bears: what is copied need not have been seen before."""
    name = "".join(pick(rng, "consonants") + pick(rng, "vowels") for _ in range(rng.randint(1, 3)))
    return name.capitalize() + pick(rng, "name_ends")


# What the data has only a name for.
DRAWN_BY_NAME = {
    "any_name": lambda rng: rng.choice([pick(rng, "first_names"), invent_name(rng)]),
    "invented_name": invent_name,
    "lower_name": lambda rng: invent_name(rng).lower(),
    "two_words": lambda rng: " ".join(rng.sample(EVERYDAY_WORDS, 2)),
    "two_joined_words": lambda rng: "_".join(rng.sample(EVERYDAY_WORDS, 2)),
    "three_words": lambda rng: " ".join(rng.sample(EVERYDAY_WORDS, 3)),
    "capitalized_word": lambda rng: rng.choice(EVERYDAY_WORDS).capitalize(),
    "record": lambda rng: json.dumps(draw_fields(rng, 1, 3)[1]),
    "nested_record": lambda rng: json.dumps(draw_nested(rng, 1)),
    "date": lambda rng: draw_text(rng, LISTS["dates"][rng.random() < 0.5]),
    "email": lambda rng: draw_text(rng, "{first_names}.{last_names}@{mail|post|box}.com").lower(),
    "code": lambda rng: draw_text(rng, "{letters}{letters}{digits}"),
    "digits": lambda rng: draw_text(rng, "{0-9}" * rng.randint(3, 5)),
    "numbers": lambda rng: [rng.randint(1, 99) for _ in range(rng.randint(3, 4))],
    "loan": lambda rng: 500 * rng.randint(2, 90),
    "true": lambda rng: True,
}


def draw_text(rng, template):
    """Fill {6-23} with a number, {mail|post} with one of these, {cities} with one of that list."""

    def fill(slot):
        name, _, high = slot[1].partition("-")
        if high:
            return str(rng.randint(int(name), int(high))).zfill(len(name))
        if name in DRAWN_BY_NAME:
            return DRAWN_BY_NAME[name](rng)
        return rng.choice(LISTS.get(name) or name.split("|"))

    return re.sub(r"{(.+?)}", fill, template)


def draw(rng, kind):
    """A value of a kind, numbers so that they are written alike in a request and in JSON."""
    if kind["draw"] in DRAWN_BY_NAME:
        return DRAWN_BY_NAME[kind["draw"]](rng)
    if kind["draw"] in LISTS:
        return rng.sample(LISTS[kind["draw"]], rng.randint(2, 3))
    text = draw_text(rng, kind["draw"])
    return json.loads(text) if kind["schema"]["type"] in ("integer", "number") else text


def spoken(value):
    """A value as one says it in a sentence."""
    items = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return " and ".join([", ".join(items[:-1]), items[-1]] if items[1:] else items)


def capitalize(text):
    return text[0].upper() + text[1:]


def tagged(tag, text, on_lines=False):
    """The text in tags, or as it is where the tag is empty."""
    space = "\n" if on_lines else ""
    return f"<{tag}>{space}{text}{space}</{tag}>" if tag else text


def mend_articles(text):
    return re.sub(r"\ba (?=[aeiouAEIOU])", "an ", text)


# ---- Chat without tools, which the dataset and the general text share, as Gemma knows such chats


def chat(rng):
    """[(what the user says, what the model says), ...]"""
    exchanges = []
    for kind in rng.sample(["fact", *DATA["chats"]], rng.randint(1, 3)):
        texts = DATA["chats"][kind]
        values = {name: draw_text(rng, text) for name, text in texts.get("values", {}).items()}
        if kind == "fact":
            values = rng.choice(DATA["facts"])
        elif kind == "list":
            name = rng.choice(["foods", "products", "first_names", "topics", "rooms", "colors"])
            items = rng.sample(LISTS[name], rng.randint(3, 4))
            values = {"said": spoken(items), "lines": "\n".join(f"- {item}" for item in items)}
        elif kind == "compare":
            pair = rng.sample(range(2, 999), 2)
            values = {"pair": pair, "larger": max(pair), "smaller": min(pair)}
        elif kind == "belongings":
            names, things = rng.sample(LISTS["first_names"], 3), rng.sample(LISTS["products"], 3)
            which = rng.randrange(3)
            known = "".join(f"{names[i]} has a {things[i]}. " for i in range(3))
            values = {"known": known, "name": names[which], "thing": things[which]}
        question = rng.choice(texts["questions"]).format(**values)
        exchanges.append((question, "".join(texts["answer"]).format(**values)))
    if rng.random() < 0.2:
        exchanges.append((pick(rng, "thanks"), DATA["welcome"]))
    return exchanges


# ---- The dataset

NUM_ROWS, TEST_SIZE, SPLIT_SEED = 1000, 0.2, 42  # split as step 1 does unless told otherwise
TOOLS, TEST_ONLY = DATA["tools"], set(DATA["test_only"])

# Results that follow from the arguments, beside what is drawn.
COMPUTED = {
    "calculate_tip": lambda bill, percentage: round(bill * percentage / 100, 2),
    "calculate_discount": lambda price, percentage: round(price * (100 - percentage) / 100, 2),
    "calculate_loan": lambda amount, years, rate: round(
        amount * (1 + rate * years / 200) / years / 12, 2
    ),
    "calculate_bmi": lambda weight, height: round(weight / height**2, 1),
    "calculate_average": lambda numbers: round(sum(numbers) / len(numbers), 1),
    "calculate_area": lambda length, width: round(length * width, 2),
    "random_number": lambda low, high: (7 * low + 5 * high) // 12,
    "define_word": lambda word: DATA["meanings"][word],
    "search_products": lambda product, max_price: round(max_price * 0.9, 1),
}


def declare(tool):
    """The declaration of a tool, as JSON schema."""
    properties = {name: TOOL_KINDS[kind]["schema"] for name, kind in tool["parameters"].items()}
    parameters = {"type": "object", "properties": properties, "required": tool["required"]}
    function = {"name": tool["name"], "description": tool["description"], "parameters": parameters}
    return {"type": "function", "function": function}


def ask_for(rng, tool, leave_out=False):
    """A request for a tool: (text, arguments), and the required parameter it leaves out."""
    slots = {text: re.findall(r"{(\w+)}", text) for text in tool["requests"]}
    missing = {text: [x for x in tool["required"] if x not in slots[text]] for text in slots}
    template = rng.choice([text for text in slots if len(missing[text]) == leave_out])
    values = {}
    while not values or len({str(value) for value in values.values()}) < len(values):
        values = {name: draw(rng, TOOL_KINDS[kind]) for name, kind in tool["parameters"].items()}
    text = template.lstrip("?").format(**{name: spoken(value) for name, value in values.items()})
    text = capitalize(pick(rng, "questions" if template[0] == "?" else "orders", text))
    text = mend_articles(text).replace("a headphones", "headphones")
    named = slots[template] + missing[template]
    arguments = {name: value for name, value in values.items() if name in named}
    return text, arguments, *missing[template]


def call_and_answer(rng, calls):
    """The turns in which the model calls tools, they answer and it tells what they say."""
    bodies, responses, replies = [], [], []
    for tool, arguments in calls:
        content = {name: draw(rng, TOOL_KINDS[kind]) for name, kind in tool["result"].items()}
        if tool["name"] in COMPUTED:
            content[tool["computed"]] = COMPUTED[tool["name"]](**arguments)
        bodies.append(json.dumps({"name": tool["name"], "arguments": arguments}))
        responses.append(json.dumps({"name": tool["name"], "content": content}))
        said = {name: spoken(value) for name, value in {**arguments, **content}.items()}
        replies.append(tool["reply"].format(**said))
    calls = "\n".join(tagged("tool_call", body, True) for body in bodies)
    responses = "\n".join(tagged("tool_response", body, True) for body in responses)
    return [("gpt", calls), ("tool", responses), ("gpt", " ".join(replies))]


def exchange(rng, kind, declared, others):
    """The turns of one thing that is asked for: [("human" | "gpt" | "tool", text), ...]."""
    tool = rng.choice(declared)
    if kind == "no tool":
        can_do = [tool["description"][0].lower() + tool["description"][1:] for tool in declared]
        sorry = f"I'm sorry, but I have no function for that. I can only {spoken(can_do)}."
        return [("human", ask_for(rng, rng.choice(others))[0]), ("gpt", sorry)]
    if kind == "question":
        text, arguments, name = ask_for(rng, tool, leave_out=True)
        question = TOOL_KINDS[tool["parameters"][name]]["question"]
        given = pick(rng, "values_given", spoken(arguments[name]))
        turns = [("human", text), ("gpt", f"Gladly. {question}?"), ("human", given)]
        calls = [(tool, arguments)]
    else:
        tools = [tool]
        if kind == "several calls":
            differ = len(declared) > 1 and rng.random() < 0.5
            tools = rng.sample(declared, 2) if differ else [tool, tool]
        calls = []
        while not calls or calls[1:] == calls[:1]:  # nobody asks for the same call twice
            texts, arguments = zip(*[ask_for(rng, tool) for tool in tools], strict=True)
            calls = list(zip(tools, arguments, strict=True))
        turns = [("human", " ".join(texts))]
    return turns + call_and_answer(rng, calls)


def make_row(rng, number, tools, main_tool):
    """A row about `main_tool`, which stands among others of `tools`; None makes a chat."""
    if main_tool is None:
        shown, system_text, exchanges = "null", DATA["no_tools"], chat(rng)
        while len(dict(exchanges)) < len(exchanges):  # nobody asks the same twice
            exchanges = chat(rng)
        turns = [turn for pair in exchanges for turn in zip(("human", "gpt"), pair, strict=True)]
    else:
        others = [tool for tool in tools if tool is not main_tool]
        rng.shuffle(others)
        num_others = rng.choice([0, 0, 0, 0, 0, 1, 1, 1, 2])
        declared = [main_tool, *others[:num_others]]
        turns = []
        for kind in rng.choice(DATA["rows"]):
            about_main = not turns and kind in ("call", "question")
            shown = [main_tool] if about_main else declared
            turns += exchange(rng, kind, shown, others[num_others:])
        turns[0] = "human", pick(rng, "greetings") + turns[0][1]
        if rng.random() < 0.2:
            turns += [("human", pick(rng, "thanks")), ("gpt", DATA["welcome"])]
        rng.shuffle(declared)
        shown = json.dumps([declare(tool) for tool in declared])
        system_text = "".join(DATA["system_text"]).format(tools=shown)
    turns = [{"from": role, "value": text} for role, text in [("system", system_text), *turns]]
    row = {"id": f"sample-{number:04}", "conversations": turns, "tools": shown}
    category = main_tool["category"] if main_tool else "Chat"
    return row | {"category": category, "subcategory": "", "task": ""}


def build_dataset(path, seed):
    """Write the dataset; rows about test-only tools stand where step 1 draws the test split."""
    datasets.disable_progress_bars()
    numbers = datasets.Dataset.from_dict({"row": range(NUM_ROWS)})
    test_rows = set(numbers.train_test_split(test_size=TEST_SIZE, seed=SPLIT_SEED)["test"]["row"])
    train_tools = [tool for tool in TOOLS if tool["name"] not in TEST_ONLY]
    test_tools = [tool for tool in TOOLS if tool["name"] in TEST_ONLY]
    rng, rows = random.Random(seed), []
    for number in range(NUM_ROWS):
        is_test = number in test_rows
        main_tools = rng.choice([train_tools, test_tools]) if is_test else train_tools
        main_tool = rng.choice(main_tools) if rng.random() < 0.82 else None
        row = make_row(rng, number, TOOLS if is_test else train_tools, main_tool)
        rows.append(json.dumps(row, ensure_ascii=False))
    path.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


# ---- General text, from which the model learns to read, to copy and to write JSON. Each text_...
# makes one conversation: [(what the user says, what the model says), ...].


def draw_value(rng, kind):
    """A value of a kind; often an invented name, so that copying is learned and not names."""
    value = draw(rng, kind)
    if not kind.get("is_name") or rng.random() >= 0.6:
        return value
    names = [invent_name(rng) for _ in (value if isinstance(value, list) else value.split())]
    return names if isinstance(value, list) else " ".join(names)


def draw_fields(rng, low, high):
    """({field name: its kind, ...}, {field name: its value, ...}), no two values alike."""
    kinds, values = {}, {}
    for key in rng.sample(sorted(KINDS), rng.randint(low, high)):
        prefixed = f"{pick(rng, 'field_prefixes')}_{key}"
        name = rng.choice([key, key, prefixed, rng.choice(EVERYDAY_WORDS)])
        value = draw_value(rng, KINDS[key])
        if str(value) not in map(str, values.values()):
            kinds[name], values[name] = KINDS[key], value
    return kinds, values


def in_words(name):
    return name.replace("_", " ")


def facts_of(values):
    """["the city is Rome", ...]"""
    return [f"the {in_words(name)} is {spoken(value)}" for name, value in values.items()]


def sentences_of(values):
    return " ".join(f"{capitalize(fact)}." for fact in facts_of(values))


def lines_of(values, margin=""):
    """Values line by line, what is nested further in."""
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [f"{margin}{name}:", lines_of(value, margin + "  ")]
        elif isinstance(value, list) and isinstance(value[0], dict):
            items = [lines_of(item, margin + "  ").lstrip() for item in value]
            lines += [f"{margin}{name}:", *(f"{margin}- {item}" for item in items)]
        else:
            lines.append(f"{margin}{name}: {spoken(value)}")
    return "\n".join(lines)


def after(start, exchanges):
    """The exchanges, with something before what the user says first."""
    (question, answer), *others = exchanges
    return [(start + question, answer), *others]


Form = namedtuple("Form", "title words noun description kinds values required")


def draw_form(rng, varied):
    """A form; varied ones share verbs in their titles, and are asked for by what they are about."""
    if varied:
        parts = {"verb": pick(rng, "common_verbs"), "noun": rng.choice(MORE_WORDS)}
        parts["whose"] = rng.choice([*MORE_WORDS, *EVERYDAY_WORDS])
        title, noun = pick(rng, "form_titles", **parts), parts["noun"]
        description = mend_articles(pick(rng, "form_descriptions", **parts))
        words = pick(rng, "form_wishes", **parts)
    else:
        nouns = [pick(rng, "form_nouns"), pick(rng, "form_nouns"), rng.choice(EVERYDAY_WORDS)]
        noun = rng.choice([*nouns, invent_name(rng).lower()])
        noun_first = rng.random() < 0.5
        word = pick(rng, "form_words" if noun_first else "form_verbs")
        title = f"{noun}_{word}" if noun_first else f"{word}_{noun}"
        words, description = in_words(title), ""
    kinds, values = draw_fields(rng, 1, 3 if varied else 4)
    required = [name for name in kinds if rng.random() < (0.9 if varied else 0.85)]
    description = description or pick(rng, "form_purposes", words)
    return Form(title, words, noun, capitalize(description), kinds, values, required)


def write_form(rng, form):
    """The title and the description of a form, and its fields as JSON schema."""
    properties = {}
    for name, kind in form.kinds.items():
        properties[name] = dict(kind["schema"])
        if name in KINDS and rng.random() >= 0.8:
            del properties[name]["description"]
    head = {"title": form.title, "description": form.description}
    return head, {"type": "object", "properties": properties, "required": form.required}


def say_field(rng, name, kind, value):
    if rng.random() < 0.65 and name.split("_")[0] not in LISTS["field_prefixes"]:
        return rng.choice(kind["phrases"]).format(spoken(value))
    return pick(rng, "fields", in_words(name), spoken(value))


def request_form(rng, form, values):
    """A request in a user's words that says the values, in any order."""
    phrases = [say_field(rng, name, form.kinds[name], value) for name, value in values.items()]
    rng.shuffle(phrases)
    if form.words != in_words(form.title):
        phrases = [form.words, *phrases] if rng.random() < 0.8 else [*phrases, form.words]
        is_order = form.words.split()[0] in LISTS["common_verbs"]
        text = pick(rng, "form_orders" if is_order else "form_questions", " ".join(phrases))
        return capitalize(mend_articles(text))
    join = rng.choice([" ", " ", ", "])
    start = rng.choice(LISTS["form_requests"])
    if rng.random() < 0.25:  # only what it is about
        start = pick(rng, "form_subjects", form.noun)
    text = (start.format(form.words) + " " + join.join(phrases)).strip()
    return capitalize(text) + ("?" if start.startswith("Can") else ".")


def fill_in_as(template, title, values):
    """The title and the values of a form, written as the template says."""
    record, as_object = json.dumps(values), json.dumps({"title": title, **values})
    return template.format(title=title, record=record, lines=lines_of(values), object=as_object)


def form_exchanges(rng, forms, varied, fill_in):
    """Something is asked of the forms: a value is missing, none fits, or it takes one or two."""
    form = rng.choice(forms)
    said = [name for name in form.values if name in form.required or rng.random() < 0.5]
    values = {name: form.values[name] for name in said}
    chance, answer = rng.random(), fill_in(form.title, values)
    if chance < 0.12:
        other = draw_form(rng, varied)
        titles = " and ".join(in_words(form.title) for form in forms)
        sorry = f"I'm sorry, none of my forms fits. I only have {titles}."
        return [(request_form(rng, other, other.values), sorry)]
    if chance < 0.27 and form.required:
        name = rng.choice(form.required)
        value = values.pop(name)
        asked = request_form(rng, form, values), f"{form.kinds[name]['question']} is it?"
        return [asked, (pick(rng, "form_values", spoken(value)), answer)]
    if chance < 0.42:
        second = rng.choice(forms)
        again = {name: draw_value(rng, second.kinds[name]) for name in second.required}
        question = request_form(rng, form, values) + " " + request_form(rng, second, again)
        return [(question, answer + "\n" + fill_in(second.title, again))]
    return [(request_form(rng, form, values), answer)]


def text_forms(rng, varied=False, style=PLAIN_STYLE, fill_in=fill_in_as, show=json.dumps):
    """Forms, and requests that are answered in a style: its instruction, its template."""
    num_forms = rng.choice([1, 2, 2, 2, 3, 3] if varied else [1, 1, 2, 2, 3])
    forms = [draw_form(rng, varied) for _ in range(num_forms)]
    written = [write_form(rng, form) for form in forms]
    content = [head | body for head, body in written]
    if varied and rng.random() < 0.7:  # nested, and in another order
        content = [{"kind": "form", "form": head | {"fields": body}} for head, body in written]
    instruction, template = style
    start = pick(rng, "form_starts", show(content)) + instruction
    exchanges = []
    for _ in range(rng.randint(1, 4)):
        exchanges += form_exchanges(rng, forms, varied, partial(fill_in, template))
        for form in forms:  # the next request comes with other values
            form.values.update({name: draw_value(rng, kind) for name, kind in form.kinds.items()})
    return after(start, exchanges)


def text_record(rng):
    """A record in JSON and questions about it."""
    kinds, values = draw_fields(rng, 2, 5)
    exchanges = []
    for name in rng.sample(sorted(values), min(len(values), rng.randint(1, 5))):
        words, value = in_words(name), spoken(values[name])
        other = spoken(draw_value(rng, kinds[name]))
        exchanges.append(pick_exchange(rng, "record", words=words, value=value, other=other))
    if rng.random() < 0.4:
        exchanges = [("Tell me all of it.", sentences_of(values))]
    return after(json.dumps(values) + "\n", exchanges)


def text_to_json(rng):
    """Values in words or lines, to be written as JSON, or the other way round."""
    values = draw_fields(rng, 1, 5)[1]
    said = {"lines": lines_of(values), "facts": ", ".join(facts_of(values))}
    return [pick_exchange(rng, "to_json", record=json.dumps(values), **said)]


def draw_item(rng, name):
    """Something to be copied, of a list of the data: often never seen before."""
    return rng.choice([draw_text(rng, text) for text in LISTS[name]])


def text_copy(rng):
    """Copying words, names and numbers nobody has seen before."""
    items = [draw_item(rng, "unseen") for _ in range(rng.randint(2, 8))]
    which = rng.randrange(len(items))
    if rng.random() < 0.4:
        names = [invent_name(rng) for _ in items]
        pairs = "; ".join(f"{name} is {text}" for name, text in zip(names, items, strict=True))
        return [(pick(rng, "find", pairs=pairs, name=names[which]), items[which])]
    said = {"listed": ", ".join(items), "joined": " ".join(items), "array": json.dumps(items)}
    return [pick_exchange(rng, "copy", **said)]


def draw_tag(rng):
    """A tag's name; markup is in the text, with other tags than the dataset's, as Gemma saw it."""
    join, words = rng.choice("___-"), rng.choice([EVERYDAY_WORDS, MORE_WORDS])
    return join.join(rng.sample(words, rng.choice([1, 1, 2, 2, 3])))


def draw_nested(rng, depth):
    """Values with objects and lists of objects among them."""
    values = draw_fields(rng, 1, 3)[1]
    for key in rng.sample(EVERYDAY_WORDS, rng.randint(1, 2) if depth else 0):
        is_list = rng.random() >= 0.7
        inner = [draw_nested(rng, 0) for _ in range(rng.randint(1, 3))] if is_list else None
        values[key] = inner or draw_nested(rng, depth - 1)
    return values


def text_tagged_forms(rng):
    """Forms that stand in tags, or are to be filled in as nested JSON, mostly in tags."""
    tag, shown_tag, on_lines = draw_tag(rng), draw_tag(rng), rng.random() < 0.7
    one, two = rng.choice([*DATA["key_pairs"], rng.sample(EVERYDAY_WORDS, 2)])
    layout = rng.randrange(len(LISTS["layouts"]))
    lines = pick(rng, "own_lines") if on_lines else ""
    instruction, name = rng.choice(EXCHANGES["tagged_form_styles"])
    what = LISTS["layouts"][layout].format(one=one, two=two)
    example = tagged(tag, "...", on_lines)
    instruction = instruction.format(what=what, tag=tag, lines=lines, example=example)
    shown_tag, each = rng.choice(["", shown_tag]), shown_tag if rng.random() < 0.1 else ""

    def fill_in(name, title, values):
        both, swapped = {one: title, two: values}, {two: values, one: title}
        under_one = {one: {"title": title, two: values}}
        text = [both, both, swapped, {title: values}, under_one, [title, values]][layout]
        return tagged(name.format(tag=tag, title=title), json.dumps(text), on_lines)

    def show(forms):
        if each:
            return "\n".join(tagged(each, json.dumps(form), on_lines) for form in forms)
        return tagged(shown_tag, json.dumps(forms), on_lines)

    return text_forms(rng, rng.random() < 0.7, [instruction, name], fill_in, show)


def text_blocks(rng):
    """Blocks in tags: what stands in one, one with other tags, all of it without tags."""
    on_lines, join = rng.random() < 0.5, rng.choice(["\n", "\n", "\n\n", " "])
    tags = [draw_tag(rng) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.3:
        tags = tags[:1] * len(tags)
    bodies = [draw_item(rng, "items") for _ in tags]
    blocks = [tagged(tag, body, on_lines) for tag, body in zip(tags, bodies, strict=True)]
    start = pick(rng, "blocks", join.join(blocks))
    which, other = rng.randrange(len(tags)), draw_tag(rng)
    said = {"place": LISTS["places"][which], "tag": tags[which], "other": other}
    said |= {"body": bodies[which], "block": blocks[which], "count": len(blocks)}
    said |= {"blocks": join.join(blocks), "bodies": join.join(bodies)}
    said["renamed"] = tagged(other, bodies[which], on_lines)
    said["wrapped"] = tagged(other, join.join(blocks), True)
    by_tag = EXCHANGES["blocks_by_tag"] if tags.count(tags[which]) == 1 else []
    chosen = rng.sample(EXCHANGES["blocks"] + by_tag, rng.randint(1, 3))
    return after(start, [tuple(text.format(**said) for text in pair) for pair in chosen])


def text_wrap(rng):
    """Words, values or several of them, to be put in tags."""
    tag, on_lines = draw_tag(rng), rng.random() < 0.5
    items = [draw_item(rng, "items") for _ in range(rng.randint(1, 4))]
    said = {"tag": tag, "lines": pick(rng, "own_lines") if on_lines else ""}
    question = pick(rng, "wrap_each" if len(items) > 1 else "wrap", items="\n".join(items), **said)
    return [(question, "\n".join(tagged(tag, item, on_lines) for item in items))]


def text_tagged_record(rng):
    """A record in tags, or one whose values stand in tags: tell it, rewrite it, answer from it."""
    tag, on_lines, told = draw_tag(rng), rng.random() < 0.6, rng.random() < 0.25
    start = f"I send you records in <{tag}> tags. Tell me what stands in them."
    exchanges = [(start, "Yes. Send me the first one.")] if told else []
    for _ in range(rng.randint(1, 3) if told else 1):
        values = draw_fields(rng, 1, 4)[1]
        said = {"tag": tag, "lines": ", on lines of their own" if on_lines else ""}
        said |= {"record": json.dumps(values), "plain": lines_of(values)}
        said |= {"facts": ", ".join(facts_of(values)), "sentences": sentences_of(values)}
        parts = [tagged(name, spoken(value)) for name, value in values.items()]
        said["as_json"] = tagged(tag, said["record"], on_lines)
        said["as_tags"] = tagged(tag, "\n".join(parts), True)
        said["shown"] = rng.choice([said["as_json"], said["as_tags"]])
        if told:
            exchanges.append((said["shown"], said["sentences"]))
        else:
            name = rng.choice(list(values))
            value = spoken(values[name])
            said |= {"words": in_words(name), "value": value, "own": tagged(name, value)}
            exchanges.append(pick_exchange(rng, "tagged_record", **said))
    return exchanges


def text_nested(rng):
    """Nested JSON, at times in tags: write it from lines, copy it, change it, answer from it."""
    values = draw_nested(rng, rng.choice([1, 1, 2]))
    tag, on_lines = draw_tag(rng), rng.random() < 0.7
    tag = tag if rng.random() < 0.5 else ""
    inside = f" in <{tag}> tags" + ", on lines of their own" * on_lines if tag else ""
    key = rng.choice(list(values))
    first, second = rng.choice([*DATA["key_pairs"], rng.sample(EVERYDAY_WORDS, 2)])
    title = rng.choice([invent_name(rng), "_".join(rng.sample(EVERYDAY_WORDS, 2))])
    parts = [draw_fields(rng, 1, 2)[1] for _ in range(rng.randint(2, 3))]
    merged = {name: value for part in parts for name, value in part.items()}
    told = [", ".join(f"{name} {spoken(value)}" for name, value in part.items()) for part in parts]
    written = {"wrapped": values, "part": values[key], "listed": {second: parts}}
    written |= {"beside": {first: title, second: values}, "merged": {first: title, second: merged}}
    said = {name: tagged(tag, json.dumps(value), on_lines) for name, value in written.items()}
    said |= {"record": json.dumps(values), "lines": lines_of(values), "inside": inside}
    said |= {"key": key, "first": first, "second": second, "title": title}
    said |= {"in_one": ", ".join(told), "in_parts": "; ".join(told)}
    return [pick_exchange(rng, "nested", **said)]


TEXTS = [(text_forms, 11), (text_record, 3), (text_to_json, 4), (text_copy, 3), (chat, 3)]
MORE_TEXTS = [(lambda rng: text_forms(rng, varied=True), 16), *TEXTS]
LAST_TEXTS = [(lambda rng: text_forms(rng, True, rng.choice(EXCHANGES["form_styles"])), 30), *TEXTS]
MARKUP_TEXTS = [(text_tagged_forms, 26), (text_blocks, 7), (text_wrap, 4)]
MARKUP_TEXTS += [(text_tagged_record, 8), (text_nested, 7), *LAST_TEXTS]

# The dataset's tags, tools of the test split, and a name beside arguments, as in a call.
HELD_BACK = re.compile(
    rf"(?s)</?(tools|think)>|\b({'|'.join(sorted(TEST_ONLY))}|tool_call|tool_response)\b"
    r'|"(?P<key>name|arguments)": .*"(?!(?P=key))(name|arguments)": '
)


def general_text(seed, texts=TEXTS):
    """Yield conversations without end, the same ones for the same seed; none is HELD_BACK."""
    rng = random.Random(seed)
    kinds, weights = zip(*texts, strict=True)
    while True:
        conversation = rng.choices(kinds, weights)[0](rng)
        if not any(HELD_BACK.search(text) for exchange in conversation for text in exchange):
            yield conversation


# ---- The model

UNUSED_SLOTS = [f"<unused{number}>" for number in range(16)]
TURN_MARKS = ["<start_of_turn>", "<end_of_turn>"]

# What may merge into one piece: a word with the space before it, unless it is capitalized, since a
# name must look the same in a sentence and in JSON; one digit; a run of punctuation.
PIECES = r"\d|[A-Z][a-z]*| ?[a-z]+|[^\sA-Za-z0-9]+(?: [^\sA-Za-z0-9]+)*|\s"


def build_tokenizer(seed):
    """A byte-level BPE tokenizer of Gemma's make, learned from the general text."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *UNUSED_SLOTS, *TURN_MARKS]
    trainer = trainers.BpeTrainer(
        vocab_size=3072, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    talks = islice(general_text(seed), 30_000)
    texts = [text for talk in talks for exchange in talk for text in exchange]
    words = EVERYDAY_WORDS + LISTS["form_nouns"]  # all of them become whole tokens
    texts += [f'a {word} "{word}"' for word in words] * 100
    tokenizer.train_from_iterator(texts, trainer)
    # The slots are added tokens, but not special ones: once used, decoded text must show them.
    definition = json.loads(tokenizer.to_str())
    for token in definition["added_tokens"]:
        token["special"] = token["content"] not in UNUSED_SLOTS
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)),
        chat_template="".join(DATA["chat_template"]),
        **{"model_max_length": 2048, "clean_up_tokenization_spaces": False, **names},
    )


def build_model(tokenizer):
    """A small Gemma 3 text model with random weights: tied embeddings, sliding and full layers."""
    names = [f"{name}_token_id" for name in ("bos", "eos", "pad")]
    ids = {name: getattr(tokenizer, name) for name in names}
    config = transformers.Gemma3TextConfig(vocab_size=len(tokenizer), **ids, **DATA["model"])
    model = transformers.Gemma3ForCausalLM(config)
    ids["eos_token_id"] = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_MARKS[1])]
    model.generation_config = transformers.GenerationConfig(**ids)
    return model


def encode(tokenizer, exchanges):
    """(token ids, whether the model says each) of a conversation in Gemma's turns."""
    ids, said = [tokenizer.bos_token_id], [False]
    for question, answer in exchanges:
        before = f"<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n"
        turns = tokenizer([before, f"{answer}<end_of_turn>", "\n"], add_special_tokens=False)
        for pieces, by_model in zip(turns["input_ids"], [False, True, False], strict=True):
            ids += pieces
            said += [by_model] * len(pieces)
    return ids, said


def make_batch(tokenizer, conversations, num_rows, length):
    """Rows filled with whole conversations: (token ids, whether the model says each)."""
    rows, num_misfits = [([], []) for _ in range(num_rows)], 0
    while num_misfits < 30:
        pieces, by_model = encode(tokenizer, next(conversations))
        row = next((row for row in rows if len(row[0]) + len(pieces) <= length), None)
        if row:
            row[0].extend(pieces)
            row[1].extend(by_model)
        num_misfits += row is None
    ids = [ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in rows]
    said = [said + [False] * (length - len(said)) for _, said in rows]
    return torch.tensor(ids), torch.tensor(said)


# What the model is taught, one course after the other. Copying is found soonest where what is
# copied is near, so it begins with short rows, for a share of the steps.
Course = namedtuple("Course", "num_steps learning_rate share_of_short_rows texts")
COURSES = [
    Course(5000, 6e-3, 0.24, TEXTS),
    Course(1700, 3e-3, 0.0, MORE_TEXTS),
    Course(1200, 3e-3, 0.0, LAST_TEXTS),
    Course(1800, 3e-3, 0.0, MARKUP_TEXTS),
]
SHORT_ROWS, LONG_ROWS = (16, 256), (8, 640)  # rows of a batch, tokens of a row
WARMUP_STEPS, CHECKPOINT_STEPS = 100, 200


def make_optimizers(model, rate):
    """Muon for the matrices of the layers, AdamW for the rest."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and "embed" not in name else others).append(weight)
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)]


def train_model(folder, seed, resume):
    """Train the model on what it says in the general text.

    In each course the learning rate is constant until half of its steps, then falls to zero. Each
    step makes its text from a seed of its own, so that a resumed run sees what it would have seen.
    """
    path = folder.with_name(f"{folder.name}-checkpoint.pt")
    unfinished = folder.with_name(f"{folder.name}-checkpoint.pt.unfinished")
    checkpoint = torch.load(path, weights_only=True) if path.exists() else None
    if checkpoint and not resume:
        sys.exit(f"error: {path} is unfinished: --resume goes on with it; remove it to start anew")
    if checkpoint and checkpoint["seed"] != seed:
        sys.exit(f"error: {path} belongs to --seed {checkpoint['seed']}: repeat it, or remove it")
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Where the hardware does not multiply in bfloat16 it is emulated, which is slow.
    has_bf16 = device == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    model = build_model(tokenizer).to(device)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    compiles = sys.platform == "linux" and shutil.which("g++")  # half as fast again
    transformer = torch.compile(model.model, dynamic=False) if compiles else model.model
    steps = [(course, step) for course in COURSES for step in range(course.num_steps)]
    first_step = checkpoint["step"] if checkpoint else 0
    for number, (course, step) in enumerate(steps[first_step:], first_step):
        if step == 0 or number == first_step:
            optimizers = make_optimizers(model, course.learning_rate)
        if step > 0 and number == first_step:
            for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        is_short = step < course.share_of_short_rows * course.num_steps
        texts = general_text(f"{seed}-{number}", course.texts)
        ids, said = make_batch(tokenizer, texts, *(SHORT_ROWS if is_short else LONG_ROWS))
        ids, said = ids.to(device), said[:, 1:].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=has_bf16):
            hidden = transformer(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[said])
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][said])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = min(1.0, (step + 1) / WARMUP_STEPS, 2 * (1 - step / course.num_steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = course.learning_rate * scale
            optimizer.step()
            optimizer.zero_grad()
        if (number + 1) % 100 == 0:
            print(f"step {number + 1:,} of {len(steps):,}: loss {loss.item():.3f}", flush=True)
        if (number + 1) % CHECKPOINT_STEPS == 0:
            states = [optimizer.state_dict() for optimizer in optimizers]
            state = {"seed": seed, "step": number + 1, "model": model.state_dict()}
            torch.save(state | {"optimizers": states}, unfinished)
            unfinished.replace(path)
    model.cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description="Make the sample anew.", allow_abbrev=False)
    parser.add_argument("--only", choices=["dataset", "model"], help="make one (default: both)")
    parser.add_argument("--seed", type=int, default=1, help="seed of both (default: 1)")
    parser.add_argument("--output-dir", type=Path, default=HERE, help="(default: the script's)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.only != "model":
        build_dataset(args.output_dir / "hermes_sample.json", args.seed)
    if args.only != "dataset":
        train_model(args.output_dir / "tiny-gemma-3", args.seed, args.resume)


if __name__ == "__main__":
    main()
