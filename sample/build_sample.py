"""Make the sample anew from a seed: a small function-calling dataset, and a small Gemma 3 that cannot call functions yet.

    python sample/build_sample.py                  # both: some 70 minutes on two cores of an AMD EPYC
    python sample/build_sample.py --resume         # go on with an interrupted model
    python sample/build_sample.py --only dataset   # seconds

hermes_sample.json holds conversations of our own making in the row layout of NousResearch/hermes-function-calling-v1. Some
of its tools stand only in rows that step 1, with its own seed, draws for the test split.

tiny-gemma-3/ is a Gemma 3 text model trained on general text of our own making: it reads requests, copies values, fills
in forms, writes JSON and chats in Gemma's turns. It never saw a tag, the form of a call, or one of those tools: it stands
where an instruction-tuned Gemma stands.
"""

import argparse
import functools
import json
import os
import random
import re
import shutil
import sys
import time
from collections import namedtuple
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 1

# ----------------------------------------------------------------------------------------------------------------------
# Values: what people ask with. A request holds each value letter for letter as it stands in the call.

FIRST_NAMES = """Anna Ben Carla David Elena Farid Grace Hugo Irene Jonas Karin Leon Maria Nina Omar Paula Quentin Rosa Samir
Tara Umar Vera Walter Xenia Yusuf Zoe Aisha Bruno Chloe Diego Emma Felix Greta Hassan Ivan Julia Kenji Laura Mateo Nadia Oscar
Priya Rafael Sofia Tomas Ursula Viktor Wendy Yara Zane Amir Bella Cyrus Dana Eric Fiona Gustav Helen Isaac Jana""".split()
LAST_NAMES = """Adams Bauer Costa Dubois Evans Fischer Garcia Hansen Ivanov Jensen Keller Lopez Moreau Novak Olsen Park Quinn Rossi
Silva Tanaka Usman Vargas Weber Young Ziegler Abbas Brandt Chen Diaz Ekman Ferrari Gupta Haddad Ito Jovic Kumar Lindgren Mendes
Nguyen Okafor Petrov Reyes Santos Turner Vogel Walker Yilmaz Zhang""".split()
CITIES = """Amsterdam Athens Bangkok Berlin Bogota Boston Brussels Cairo Chicago Copenhagen Dakar Delhi Dublin Florence Geneva Hamburg
Hanoi Havana Helsinki Istanbul Jakarta Karachi Kyoto Lagos Lima Lisbon London Lyon Madrid Manila Melbourne Milan Montreal Mumbai
Munich Nairobi Naples Osaka Oslo Paris Perth Porto Prague Quito Riga Rome Santiago Seattle Seoul Seville Sofia Stockholm Sydney
Taipei Tallinn Tokyo Toronto Tunis Turin Valencia Vienna Vilnius Warsaw Zagreb Zurich""".split()
COUNTRIES = """Argentina Austria Belgium Brazil Canada Chile China Colombia Denmark Egypt Estonia Finland France Germany Ghana Greece
Hungary Iceland India Ireland Italy Japan Kenya Latvia Mexico Morocco Norway Peru Poland Portugal Romania Senegal Spain Sweden
Thailand Tunisia Turkey Uruguay Vietnam""".split()
ADJECTIVES = "Silent Golden Hidden Broken Distant Little Lost Quiet Red Silver Last Secret Frozen Gentle Wild Bright Empty Blue".split()
NOUNS = "River Garden Mountain Letter Island Winter Harbor Forest Mirror Road Bridge Summer Shadow Lantern Ocean Stone Dream Window".split()
PLACE_WORDS = "Olive Maple Lotus Anchor Copper Willow Saffron Ginger Harvest Juniper Pepper Walnut Basil Amber Cedar Coral Falcon".split()
PLACE_KINDS = "Grill Kitchen House Garden Bistro Corner Table Tavern Cafe Room".split()
COMPANY_KINDS = "Motors Foods Energy Systems Labs Airlines Media Bank Robotics Textiles".split()
MONTHS = "January February March April May June July August September October November December".split()
CURRENCIES = "USD EUR GBP JPY CHF CAD AUD SEK NOK INR BRL MXN".split()
LANGUAGES = "French German Spanish Italian Japanese Polish Turkish Arabic Korean Swedish Greek Dutch".split()
CUISINES = "Italian Indian Thai Greek Mexican Japanese Lebanese Turkish French Korean".split()
FOODS = """rice beans chicken tomatoes onions garlic cheese eggs potatoes carrots spinach mushrooms salmon pasta lemon butter corn
apples bread yogurt lentils tofu peppers milk""".split()
GENRES = "comedy drama horror mystery romance fantasy adventure western".split()
TOPICS = "football gardening music travel science health business history cooking climate art chess".split()
PRODUCTS = "lamp backpack keyboard headphones jacket blender camera chair tent kettle bicycle mirror carpet printer umbrella toaster".split()
ROOMS = "kitchen bedroom bathroom office garage hallway basement nursery".split()
COLORS = "red blue green yellow purple orange white pink".split()
ACTIVITIES = "running swimming cycling yoga rowing hiking boxing dancing".split()
PROFESSIONS = "nurse teacher carpenter engineer baker plumber designer pilot farmer lawyer".split()
SUBJECTS = "biology algebra geography physics chemistry literature economics philosophy".split()
PRIORITIES = "low medium high".split()
WORDS = "harbor lantern meadow glacier orchard puzzle whisper compass thunder velvet marble horizon pebble canyon".split()
TASKS = ["buy milk", "call the bank", "water the plants", "pay the rent", "clean the oven", "fix the bike", "pick up the keys",
         "wash the car", "order new shoes", "return the books", "feed the cat", "paint the fence", "book the dentist", "walk the dog"]
SENTENCES = ["I will be late", "The meeting is moved", "See you at the station", "Dinner is ready", "Please bring the keys",
             "The train is delayed", "Happy birthday", "We need more chairs", "The order has arrived", "Thank you for the help",
             "Where are you", "Good luck today", "The door is open", "I found your wallet", "Lunch is on me", "The game starts soon"]
EVENTS = ["Team meeting", "Dentist visit", "Birthday dinner", "Yoga class", "Book club", "Project review", "Piano lesson", "Staff lunch",
          "Budget talk", "Family picnic", "Chess evening", "Garden work"]
WEATHER = "sunny cloudy rainy windy foggy snowy clear stormy".split()


def invent_name(rng):
    """A pronounceable name that nobody bears: what is copied from a request need not have been seen before."""
    syllables = [rng.choice("bcdfghklmnprstvz") + rng.choice(["a", "e", "i", "o", "u", "ai", "ea", "or", "an", "il", "es", "un"])
                 for _ in range(rng.randint(1, 3))]
    return "".join(syllables).capitalize() + rng.choice(["", "n", "r", "s", "l", "t", "x", "m"])


def whole(low, high):
    return lambda rng: rng.randint(low, high)


def decimal(low, high):
    """A number with one digit after the point, never a zero: it is written alike in a request and in JSON."""
    return lambda rng: rng.randint(low, high) + rng.randint(1, 9) / 10


def one_of(values):
    return lambda rng: rng.choice(values)


def some_of(values):
    return lambda rng: rng.sample(values, rng.randint(2, 3))


def make_date(rng):
    if rng.random() < 0.5:
        return f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"
    return f"{rng.randint(2025, 2029)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def make_code(rng):
    return "".join(rng.choice("ABCDEFGHKLMNPRSTVXZ") for _ in range(2)) + "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 5)))


def make_full_name(rng):
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}

# What a parameter can be: its JSON schema, what it means, how a value is drawn, how the missing one is asked for, and ways
# to say it in a request. `is_name` values may as well be invented names.
Kind = namedtuple("Kind", "schema description draw question phrases is_name", defaults=[False])
KINDS = {
    "city": Kind(STRING, "Name of the city", one_of(CITIES), "Which city", ["in {}", "for {}"], True),
    "origin": Kind(STRING, "Place of departure", one_of(CITIES), "Which place of departure", ["from {}", "starting in {}"], True),
    "destination": Kind(STRING, "Place of arrival", one_of(CITIES), "Which place of arrival", ["to {}", "ending in {}"], True),
    "country": Kind(STRING, "Name of the country", one_of(COUNTRIES), "Which country", ["in {}", "for {}"], True),
    "person": Kind(STRING, "Name of the person", make_full_name, "Which person", ["for {}", "with {}", "to {}"], True),
    "first_name": Kind(STRING, "First name", one_of(FIRST_NAMES), "Which name", ["for {}", "called {}", "to {}"], True),
    "author": Kind(STRING, "Name of the author", make_full_name, "Which author", ["by {}", "from {}"], True),
    "company": Kind(STRING, "Name of the company", lambda rng: f"{rng.choice(LAST_NAMES)} {rng.choice(COMPANY_KINDS)}",
                    "Which company", ["of {}", "for {}"], True),
    "restaurant": Kind(STRING, "Name of the restaurant", lambda rng: f"{rng.choice(PLACE_WORDS)} {rng.choice(PLACE_KINDS)}",
                       "Which restaurant", ["at {}", "at the {}"], True),
    "title": Kind(STRING, "Title of the work", lambda rng: f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}",
                  "Which title", ["called {}", "named {}", "with the title {}"], True),
    "event": Kind(STRING, "Title of the event", one_of(EVENTS), "Which title", ["called '{}'", "named '{}'"]),
    "date": Kind(STRING, "Day of the year", make_date, "Which date", ["on {}", "for {}"]),
    "time": Kind(STRING, "Time of day", lambda rng: f"{rng.randint(6, 23)}:{rng.choice('0134')}{rng.choice('05')}", "Which time",
                 ["at {}", "for {}"]),
    "email": Kind(STRING, "Address of the mailbox",
                  lambda rng: f"{rng.choice(FIRST_NAMES)}.{rng.choice(LAST_NAMES)}@{rng.choice(['mail', 'post', 'box'])}.com".lower(),
                  "Which address", ["to {}", "for {}"]),
    "phone": Kind(STRING, "Phone number", lambda rng: f"555-{rng.randint(1000, 9999)}", "Which phone number", ["with the number {}"]),
    "code": Kind(STRING, "Number of the order", make_code, "Which number", ["with the number {}", "number {}"]),
    "word": Kind(STRING, "The word", one_of(WORDS), "Which word", ["of '{}'", "for '{}'"]),
    "message": Kind(STRING, "Text to send", one_of(SENTENCES), "Which text", ["saying '{}'", "with the text '{}'"]),
    "task": Kind(STRING, "What has to be done", one_of(TASKS), "Which task", ["to {}", "about '{}'"]),
    "topic": Kind(STRING, "The topic", one_of(TOPICS), "Which topic", ["about {}", "on {}"]),
    "subject": Kind(STRING, "The subject", one_of(SUBJECTS), "Which subject", ["in {}", "for {}"]),
    "product": Kind(STRING, "Name of the product", one_of(PRODUCTS), "Which product", ["for a {}", "of the {}"]),
    "food": Kind(STRING, "Name of the food", one_of(FOODS), "Which food", ["of {}", "with {}"]),
    "room": Kind(STRING, "Name of the room", one_of(ROOMS), "Which room", ["in the {}", "for the {}"]),
    "color": Kind(STRING, "The color", one_of(COLORS), "Which color", ["in {}", "with the color {}"]),
    "activity": Kind(STRING, "The activity", one_of(ACTIVITIES), "Which activity", ["of {}", "for {}"]),
    "profession": Kind(STRING, "The profession", one_of(PROFESSIONS), "Which profession", ["as a {}", "for a {}"]),
    "genre": Kind(STRING, "The genre", one_of(GENRES), "Which genre", ["of the genre {}"]),
    "language": Kind(STRING, "The language", one_of(LANGUAGES), "Which language", ["in {}", "into {}"]),
    "cuisine": Kind(STRING, "The style of cooking", one_of(CUISINES), "Which style of cooking", ["with {} food"]),
    "from_currency": Kind(STRING, "Currency to convert from", one_of(CURRENCIES), "Which first currency", ["from {}"]),
    "to_currency": Kind(STRING, "Currency to convert to", one_of(CURRENCIES), "Which second currency", ["to {}", "into {}"]),
    "priority": Kind({**STRING, "enum": PRIORITIES}, "How urgent it is", one_of(PRIORITIES), "Which priority", ["with {} priority"]),
    "people": Kind(INTEGER, "Number of people", whole(2, 19), "How many people", ["for {} people", "for a group of {}"]),
    "days": Kind(INTEGER, "Number of days", whole(2, 30), "How many days", ["for {} days", "over {} days"]),
    "nights": Kind(INTEGER, "Number of nights", whole(2, 20), "How many nights", ["for {} nights"]),
    "minutes": Kind(INTEGER, "Duration in minutes", whole(2, 120), "How many minutes", ["for {} minutes"]),
    "years": Kind(INTEGER, "Number of years", whole(2, 40), "How many years", ["over {} years", "for {} years"]),
    "year": Kind(INTEGER, "The year", whole(1950, 2029), "Which year", ["of the year {}", "from {}"]),
    "quantity": Kind(INTEGER, "How many pieces", whole(2, 99), "How many pieces", ["with {} pieces"]),
    "grams": Kind(INTEGER, "Weight in grams", whole(20, 900), "How many grams", ["of {} grams"]),
    "number": Kind(INTEGER, "A whole number", whole(1, 999), "Which number", ["with the value {}"]),
    "rating": Kind(INTEGER, "Number of stars", whole(1, 5), "How many stars", ["with {} stars"]),
    "percentage": Kind(INTEGER, "Share in percent", whole(2, 60), "How many percent", ["of {} percent", "with {} percent"]),
    "amount": Kind(INTEGER, "Amount of money", whole(10, 9500), "Which amount", ["of {}", "over {} dollars"]),
    "price": Kind(NUMBER, "Price in dollars", decimal(3, 900), "Which price", ["of {} dollars", "below {} dollars"]),
    "degrees": Kind(NUMBER, "Temperature in degrees", decimal(2, 39), "How many degrees", ["of {} degrees", "at {} degrees"]),
    "length": Kind(NUMBER, "Length in meters", decimal(1, 90), "Which length", ["with a length of {} meters"]),
    "width": Kind(NUMBER, "Width in meters", decimal(1, 90), "Which width", ["with a width of {} meters"]),
    "weight": Kind(NUMBER, "Weight in kilograms", decimal(30, 120), "Which weight", ["with a weight of {} kilograms"]),
    "foods": Kind({"type": "array", "items": STRING}, "Names of foods", some_of(FOODS), "Which foods", ["with {}", "of {}"]),
    "names": Kind({"type": "array", "items": STRING}, "First names", some_of(FIRST_NAMES), "Which names", ["with {}", "for {}"], True),
    "numbers": Kind({"type": "array", "items": INTEGER}, "List of numbers", lambda rng: [rng.randint(1, 99) for _ in range(rng.randint(3, 4))], "Which numbers",
                    ["of {}", "with the numbers {}"]),
    "weather": Kind(STRING, "The weather", one_of(WEATHER), "Which weather", ["with {} weather"]),
}

# ----------------------------------------------------------------------------------------------------------------------
# Tools of the dataset

MEANINGS = {
    "harbor": "a place where ships are safe", "lantern": "a lamp to carry", "meadow": "a field of grass",
    "glacier": "a slow river of ice", "orchard": "a garden of fruit trees", "puzzle": "a game that makes you think",
    "whisper": "to speak very quietly", "compass": "a tool that shows the north", "thunder": "the sound after lightning",
    "velvet": "a soft cloth", "marble": "a hard stone that shines", "horizon": "the line where earth and sky meet",
    "pebble": "a small round stone", "canyon": "a deep valley of rock",
}

# Kinds that only tools have, and KINDS that are said otherwise there.
TOOL_KINDS = {
    **KINDS,
    "from_currency": KINDS["from_currency"]._replace(question="From which currency"),
    "to_currency": KINDS["to_currency"]._replace(question="Into which currency"),
    "percentage": KINDS["percentage"]._replace(question="What percentage"),
    "flight_number": KINDS["code"]._replace(description="Number of the flight", question="Which flight number"),
    "package_number": KINDS["code"]._replace(description="Number of the package", question="Which package number"),
    "order_number": KINDS["code"]._replace(question="Which order number"),
    "charity": KINDS["company"]._replace(description="Name of the charity", question="Which charity",
                                         draw=lambda rng: f"{rng.choice(PLACE_WORDS)} {rng.choice(['Trust', 'Fund', 'Shelter', 'Aid'])}"),
    "height": KINDS["length"]._replace(description="Height in meters", question="Which height", draw=decimal(1, 1)),
    "bill": KINDS["price"]._replace(description="Amount of the bill in dollars", question="How much is the bill"),
    "limit": Kind(INTEGER, "How many to show", whole(2, 9), "How many", []),
    "characters": Kind(INTEGER, "Number of characters", whole(8, 30), "How many characters", []),
    "low": Kind(INTEGER, "Smallest number", whole(1, 99), "What is the smallest number", []),
    "high": Kind(INTEGER, "Largest number", whole(100, 999), "What is the largest number", []),
    "loan": Kind(INTEGER, "Amount of the loan in dollars", lambda rng: 500 * rng.randint(2, 90), "How large is the loan", []),
    "rate": Kind(INTEGER, "Interest in percent", whole(2, 9), "What interest", []),
    "minimum_stars": Kind(INTEGER, "Number of stars", whole(2, 5), "How many stars", []),
    "temperature": Kind(NUMBER, "Temperature in degrees", decimal(16, 25), "How many degrees", []),
    # In results only
    "millions": Kind(INTEGER, "", whole(2, 140), "", []),
    "few": Kind(INTEGER, "", whole(2, 15), "", []),
    "gate": Kind(INTEGER, "", whole(1, 60), "", []),
    "exchange_rate": Kind(NUMBER, "", decimal(0, 9), "", []),
    "hotel": Kind(STRING, "", lambda rng: f"Hotel {rng.choice(PLACE_WORDS)}", "", []),
    "pharmacy": Kind(STRING, "", lambda rng: f"{rng.choice(PLACE_WORDS)} Pharmacy", "", []),
    "evening": Kind(STRING, "", lambda rng: f"{rng.randint(18, 23)}:{rng.choice('0134')}{rng.choice('05')}", "", []),
    "morning": Kind(STRING, "", lambda rng: f"{rng.randint(5, 7)}:{rng.choice('0134')}{rng.choice('05')}", "", []),
    "true": Kind(STRING, "", lambda rng: True, "", []),
    "artist": KINDS["author"]._replace(description="Name of the artist", question="Which artist"),
}

# Results that follow from the arguments, beside what is drawn.
COMPUTED = {
    "calculate_tip": lambda bill, percentage: {"tip": round(bill * percentage / 100, 2)},
    "calculate_discount": lambda price, percentage: {"result": round(price * (100 - percentage) / 100, 2)},
    "calculate_loan": lambda amount, years, rate: {"payment": round(amount * (1 + rate * years / 200) / years / 12, 2)},
    "calculate_bmi": lambda weight, height: {"bmi": round(weight / height**2, 1)},
    "calculate_average": lambda numbers: {"average": round(sum(numbers) / len(numbers), 1)},
    "calculate_area": lambda length, width: {"area": round(length * width, 2)},
    "random_number": lambda low, high: {"result": (7 * low + 5 * high) // 12},
    "define_word": lambda word: {"meaning": MEANINGS[word]},
    "search_products": lambda product, max_price: {"price": round(max_price * 0.9, 1)},
}

# `parameters` lists "name" or "name=kind", with "?" behind an optional one. A request that leaves out a required parameter
# is answered by asking for it. What stands in `requests` is an order ("book a table ..."), or with "?" a whole question.
Tool = namedtuple("Tool", "name description parameters requests result reply category")


def tools_of(category, *rows):
    return [Tool(*row, category) for row in rows]


TOOLS = [
    *tools_of(
        "Weather and Time",
        ("get_weather", "Get the current weather in a city", "city",
         ["tell me the weather in {city}", "?What is the weather like in {city} right now?", "?Is the weather good in {city} today?",
          "check the weather"],
         "degrees weather", "It is {degrees} degrees and {weather} in {city}."),
        ("get_forecast", "Get the weather forecast of a city for the next days", "city days",
         ["get the forecast for {city} for the next {days} days", "?What is the forecast in {city} for {days} days?",
          "give me a forecast for {days} days", "show me the weather forecast for {city}"],
         "degrees weather", "The forecast for {city} says {weather} weather with {degrees} degrees."),
        ("get_time", "Get the local time in a city", "city",
         ["tell me the time in {city}", "?What time is it in {city}?", "look up the local time"],
         "time", "It is {time} in {city}."),
        ("get_air_quality", "Get the air quality in a city", "city",
         ["check the air quality in {city}", "?How good is the air in {city} today?", "tell me the air quality"],
         "index=gate", "The air quality index in {city} is {index}."),
        ("get_sunrise", "Get the time of the sunrise in a city on a date", "city date",
         ["find out when the sunrise is in {city} on {date}", "?When is the sunrise in {city} on {date}?", "look up the sunrise in {city}"],
         "time=morning", "The sunrise in {city} is at {time} on {date}."),
    ),
    *tools_of(
        "Travel",
        ("book_flight", "Book a flight between two cities", "origin destination date",
         ["book a flight from {origin} to {destination} on {date}", "?Can you get me a flight to {destination} from {origin} on {date}?",
          "book a flight from {origin} to {destination}", "reserve a flight to {destination} on {date}"],
         "flight=code", "Your flight {flight} from {origin} to {destination} is booked."),
        ("search_trains", "Search for trains between two cities", "origin destination",
         ["search for trains from {origin} to {destination}", "?Which trains go from {origin} to {destination}?", "find a train to {destination}"],
         "train=code departure=time", "Train {train} leaves {origin} for {destination} at {departure}."),
        ("book_hotel", "Book a hotel room in a city", "city nights guests=people",
         ["book a hotel in {city} for {nights} nights for {guests} people", "?Can you find a hotel room in {city} for {guests} guests and {nights} nights?",
          "book a hotel in {city} for {guests} people"],
         "hotel price", "I booked {hotel} in {city} for {price} dollars a night."),
        ("rent_car", "Rent a car in a city for some days", "city days",
         ["rent a car in {city} for {days} days", "?Can I rent a car for {days} days in {city}?", "rent a car for {days} days"],
         "price", "Your car in {city} is reserved and costs {price} dollars."),
        ("get_directions", "Get directions between two places", "origin destination",
         ["give me directions from {origin} to {destination}", "?How do I get from {origin} to {destination}?", "get directions to {destination}"],
         "minutes", "The trip from {origin} to {destination} takes {minutes} minutes."),
        ("calculate_distance", "Calculate the distance between two places", "origin destination",
         ["calculate the distance from {origin} to {destination}", "?What is the distance between {origin} and {destination}?",
          "work out the distance to {destination}"],
         "distance=number", "The distance from {origin} to {destination} is {distance} kilometers."),
        ("get_flight_status", "Get the status of a flight", "flight_number",
         ["check the status of flight {flight_number}", "?Is flight {flight_number} on time?", "check the status of my flight"],
         "gate departure=time", "Flight {flight_number} leaves from gate {gate} at {departure}."),
        ("find_attractions", "Find attractions in a city", "city limit?",
         ["find attractions in {city}", "?Which attractions are there in {city}?", "list {limit} attractions in {city}", "find some attractions"],
         "name=title", "You could visit the {name} in {city}."),
    ),
    *tools_of(
        "Food",
        ("book_table", "Book a table at a restaurant", "restaurant people time",
         ["book a table at {restaurant} for {people} people at {time}", "?Can I have a table for {people} at the {restaurant} at {time}?",
          "book a table for {people} people at {time}", "reserve a table at the {restaurant} at {time}"],
         "number", "Your table at {restaurant} for {people} people is booked under number {number}."),
        ("find_restaurant", "Find a restaurant with a style of cooking", "cuisine city",
         ["find a {cuisine} restaurant in {city}", "?Where in {city} is a good {cuisine} restaurant?", "find a {cuisine} restaurant"],
         "name=restaurant stars=minimum_stars", "The {name} in {city} has {stars} stars."),
        ("search_recipes", "Search for recipes with ingredients", "ingredients=foods",
         ["search for recipes with {ingredients}", "?What recipes can I cook with {ingredients}?", "find a recipe for dinner"],
         "recipe=title minutes", "I found the recipe {recipe}, which takes {minutes} minutes."),
        ("get_nutrition", "Get the nutrition facts of a food", "food grams",
         ["get the nutrition facts of {grams} grams of {food}", "?What are the nutrition facts for {grams} grams of {food}?",
          "look up the nutrition facts of {food}"],
         "calories=number", "{grams} grams of {food} have {calories} calories."),
        ("order_groceries", "Order groceries to your home", "items=foods time",
         ["order groceries for {time}: {items}", "?Can you order {items} with the groceries for {time}?", "order groceries with {items}"],
         "price", "Your groceries cost {price} dollars and arrive at {time}."),
        ("add_to_shopping_list", "Add foods to the shopping list", "items=foods",
         ["add {items} to the shopping list", "put {items} on my shopping list", "add something to my shopping list"],
         "entries=few", "The shopping list now has {entries} entries."),
    ),
    *tools_of(
        "Money",
        ("convert_currency", "Convert an amount from one currency to another", "amount from_currency to_currency",
         ["convert {amount} {from_currency} to {to_currency}", "?How much is {amount} {from_currency} in {to_currency}?",
          "convert {amount} {from_currency}"],
         "result=price", "{amount} {from_currency} are {result} {to_currency}."),
        ("get_exchange_rate", "Get the exchange rate of two currencies", "from_currency to_currency",
         ["get the exchange rate from {from_currency} to {to_currency}", "?What is the exchange rate of {from_currency} to {to_currency}?",
          "show me the exchange rate for {from_currency}"],
         "rate=exchange_rate", "The exchange rate from {from_currency} to {to_currency} is {rate}."),
        ("calculate_tip", "Calculate the tip of a bill", "bill percentage",
         ["calculate a tip of {percentage} percent for a bill of {bill} dollars", "?How large is a {percentage} percent tip on {bill} dollars?",
          "calculate the tip for a bill of {bill} dollars"],
         "", "The tip for a bill of {bill} dollars is {tip} dollars."),
        ("calculate_discount", "Calculate the price after a discount", "price percentage",
         ["calculate a discount of {percentage} percent on {price} dollars", "?What is left of {price} dollars after a discount of {percentage} percent?",
          "calculate the discount on {price} dollars"],
         "", "With a discount of {percentage} percent you pay {result} dollars."),
        ("calculate_loan", "Calculate the monthly payment of a loan", "amount=loan years rate",
         ["calculate a loan of {amount} dollars over {years} years at {rate} percent",
          "?What do I pay monthly for a loan of {amount} dollars at {rate} percent for {years} years?",
          "calculate a loan of {amount} dollars over {years} years"],
         "", "The loan of {amount} dollars costs {payment} dollars a month."),
        ("get_stock_price", "Get the stock price of a company", "company",
         ["get the stock price of {company}", "?What is the stock of {company} worth today?", "look up a stock price"],
         "price", "The stock of {company} costs {price} dollars."),
        ("transfer_money", "Transfer money to a person", "person amount",
         ["transfer {amount} dollars to {person}", "transfer money to {person}, {amount} dollars", "transfer money to {person}"],
         "number=code", "I transferred {amount} dollars to {person}. The number is {number}."),
        ("create_invoice", "Create an invoice for a customer", "customer=person amount date",
         ["create an invoice for {customer} over {amount} dollars due on {date}", "write {customer} an invoice of {amount} dollars for {date}",
          "create an invoice for {customer} over {amount} dollars"],
         "invoice=code", "Invoice {invoice} for {customer} over {amount} dollars is ready."),
        ("donate_money", "Donate money to a charity", "charity amount",
         ["donate {amount} dollars to {charity}", "give {charity} a donation of {amount} dollars", "donate {amount} dollars"],
         "receipt=code", "Thank you for donating {amount} dollars. Your receipt is {receipt}."),
    ),
    *tools_of(
        "Calendar and Tasks",
        ("create_event", "Create an event in the calendar", "title=event date time",
         ["create the event '{title}' on {date} at {time}", "put '{title}' in my calendar on {date} at {time}",
          "create an event called '{title}' on {date}", "add '{title}' to the calendar at {time}"],
         "event=code", "The event {title} is in your calendar on {date} at {time}."),
        ("delete_event", "Delete an event from the calendar", "title=event",
         ["delete the event '{title}' from my calendar", "remove '{title}' from the calendar", "delete an event from my calendar"],
         "left=few", "I deleted {title}. There are {left} events left."),
        ("set_alarm", "Set an alarm clock", "time",
         ["set an alarm for {time}", "?Can you set my alarm clock to {time}?", "wake me with an alarm at {time}", "set an alarm"],
         "alarms=few", "Your alarm is set for {time}. You have {alarms} alarms now."),
        ("set_timer", "Set a timer for some minutes", "minutes",
         ["set a timer for {minutes} minutes", "start a timer of {minutes} minutes", "set a timer"],
         "ends=time", "The timer runs for {minutes} minutes until {ends}."),
        ("create_reminder", "Create a reminder for a task", "task date",
         ["create a reminder to {task} on {date}", "?Can you set a reminder for {date} to {task}?", "create a reminder to {task}"],
         "number=code", "I will remind you on {date} to {task}."),
        ("add_task", "Add a task to the to-do list", "task priority",
         ["add the task '{task}' with {priority} priority", "put '{task}' on my to-do list with {priority} priority",
          "add '{task}' to my tasks"],
         "tasks=few", "The task is on your list with {priority} priority. You have {tasks} tasks."),
        ("book_appointment", "Book an appointment with a doctor", "doctor=person date time",
         ["book an appointment with doctor {doctor} on {date} at {time}", "?Can I have an appointment at {time} on {date} with doctor {doctor}?",
          "book an appointment with doctor {doctor} on {date}"],
         "number=code", "Your appointment with {doctor} is on {date} at {time}."),
    ),
    *tools_of(
        "Messages",
        ("send_email", "Send an email to an address", "address=email text=message",
         ["send an email to {address} saying '{text}'", "write an email with the text '{text}' to {address}", "send an email saying '{text}'",
          "send an email to {address}"],
         "sent=time", "Your email to {address} was sent at {sent}."),
        ("send_message", "Send a text message to a person", "person text=message",
         ["send a message to {person} saying '{text}'", "text {person} the message '{text}'", "send the message '{text}'"],
         "sent=time", "Your message to {person} was sent at {sent}."),
        ("make_call", "Make a phone call to a person", "person",
         ["make a call to {person}", "?Can you call {person} on the phone?", "make a phone call"],
         "minutes", "I called {person}. The call took {minutes} minutes."),
        ("add_contact", "Add a contact to the address book", "name=person phone",
         ["add {name} to my contacts with the number {phone}", "save the contact {name}, phone {phone}", "add the contact {name}"],
         "contacts=number", "{name} is saved. You have {contacts} contacts."),
        ("translate_text", "Translate a text into a language", "text=message language",
         ["translate '{text}' into {language}", "?How do you say '{text}' in {language}? Please translate.", "translate '{text}'"],
         "file=code", "The translation into {language} is saved as {file}."),
        ("define_word", "Look up the definition of a word", "word",
         ["define the word '{word}'", "?What is the definition of '{word}'?", "look up a word"],
         "", "The word {word} means {meaning}."),
        ("check_spelling", "Check the spelling of a word", "word",
         ["check the spelling of '{word}'", "?Is the spelling of '{word}' right?", "check the spelling of a word"],
         "correct=true", "The word {word} is spelled right."),
        ("create_note", "Create a note with a title", "title text=message",
         ["create a note called {title} with the text '{text}'", "write the note {title} saying '{text}'", "create a note saying '{text}'"],
         "notes=few", "The note {title} is saved. You have {notes} notes."),
    ),
    *tools_of(
        "Books, Films and Music",
        ("search_books", "Search for books by an author", "author",
         ["search for books by {author}", "?Which books did {author} write?", "search for books"],
         "title", "I found the book {title} by {author}."),
        ("search_movies", "Search for movies of a genre and a year", "genre year",
         ["search for {genre} movies from {year}", "?Which {genre} movies came out in {year}?", "find {genre} movies"],
         "title stars=minimum_stars", "I found the {genre} movie {title} with {stars} stars."),
        ("get_movie_details", "Get the details of a movie", "title",
         ["get the details of the movie {title}", "?Who made the movie {title}? Get me the details.", "get the details of a movie"],
         "director=person year", "{title} is a movie by {director} from {year}."),
        ("play_song", "Play a song by an artist", "title artist",
         ["play the song {title} by {artist}", "?Can you play me the song {title} from {artist}?", "play a song by {artist}"],
         "minutes", "Now playing {title} by {artist}, for {minutes} minutes."),
        ("get_news", "Get the latest news about a topic", "topic limit?",
         ["get the latest news about {topic}", "?What is the news on {topic}?", "show me {limit} news about {topic}", "show me the news"],
         "headline=title", "The latest news about {topic} is: {headline}."),
        ("write_review", "Write a review with stars", "title rating=minimum_stars",
         ["write a review of {title} with {rating} stars", "give {title} a review of {rating} stars", "write a review of {title}"],
         "reviews=number", "Your review of {title} with {rating} stars is online."),
    ),
    *tools_of(
        "Shopping",
        ("search_products", "Search the shop for a product below a price", "product max_price=price",
         ["search for a {product} below {max_price} dollars in the shop", "find me a {product} that costs less than {max_price} dollars",
          "search the shop for a {product}"],
         "brand=company", "I found a {product} from {brand} for {price} dollars."),
        ("order_product", "Order a product in the shop", "product quantity color?",
         ["order {quantity} pieces of the product {product}", "order the product {product} in {color}, {quantity} pieces", "order the product {product}"],
         "order=code", "Your order of {quantity} pieces has the number {order}."),
        ("get_order_status", "Get the status of an order", "order_number",
         ["check the status of my order {order_number}", "?Where is my order {order_number}?", "check the status of my order"],
         "days", "Your order {order_number} arrives in {days} days."),
        ("cancel_order", "Cancel an order in the shop", "order_number",
         ["cancel my order {order_number}", "?Can you cancel order {order_number} for me?", "cancel my order"],
         "refund=price", "Order {order_number} is canceled. You get {refund} dollars back."),
        ("track_package", "Track a package on its way", "package_number",
         ["track the package {package_number}", "?Where is my package {package_number}?", "track my package"],
         "city", "Your package {package_number} is in {city} now."),
    ),
    *tools_of(
        "Home",
        ("set_thermostat", "Set the thermostat of a room", "room degrees=temperature",
         ["set the thermostat in the {room} to {degrees} degrees", "?Can you turn the thermostat of the {room} to {degrees} degrees?",
          "set the thermostat to {degrees} degrees"],
         "minutes", "The {room} will reach {degrees} degrees in {minutes} minutes."),
        ("set_light", "Set the color of the light in a room", "room color",
         ["set the light in the {room} to {color}", "?Can you make the light {color} in the {room}?", "set the light in the {room}"],
         "lamps=few", "I set {lamps} lamps in the {room} to {color}."),
        ("start_vacuum", "Start the vacuum cleaner in a room", "room minutes?",
         ["start the vacuum cleaner in the {room}", "run the vacuum in the {room} for {minutes} minutes", "start the vacuum cleaner"],
         "battery=percentage", "The vacuum is cleaning the {room}. Its battery has {battery} percent."),
        ("lock_door", "Lock the door of a room", "room",
         ["lock the door of the {room}", "?Is the {room} door open? Please lock it.", "lock a door"],
         "time", "The door of the {room} has been locked since {time}."),
    ),
    *tools_of(
        "Health and Learning",
        ("calculate_bmi", "Calculate the body mass index", "weight height",
         ["calculate the body mass index for {weight} kilograms and {height} meters", "?What is my body mass index with {weight} kilograms at {height} meters?",
          "calculate my body mass index for {weight} kilograms"],
         "", "The body mass index is {bmi}."),
        ("log_workout", "Log a workout with its minutes", "activity minutes",
         ["log a workout of {minutes} minutes of {activity}", "note my {activity} workout of {minutes} minutes", "log a {activity} workout"],
         "calories=number", "{minutes} minutes of {activity} burned {calories} calories."),
        ("find_pharmacy", "Find an open pharmacy in a city", "city",
         ["find an open pharmacy in {city}", "?Where is a pharmacy in {city}?", "find a pharmacy"],
         "name=pharmacy closes=evening", "The {name} in {city} is open until {closes}."),
        ("search_jobs", "Search for jobs of a profession", "profession city",
         ["search for jobs as a {profession} in {city}", "?Are there {profession} jobs in {city}?", "search for jobs as a {profession}"],
         "company salary=amount", "{company} in {city} is looking for a {profession}."),
        ("get_grade", "Get the grade of a student in a subject", "student=first_name subject",
         ["get the grade of {student} in {subject}", "?Which grade did {student} get in {subject}?", "look up the grade of {student}"],
         "grade=rating", "{student} has grade {grade} in {subject}."),
        ("enroll_student", "Enroll a student in a course", "student=person course=subject",
         ["enroll the student {student} in the {course} course", "put {student} into the course on {course} as a student",
          "enroll a student in the {course} course"],
         "room=number", "{student} is enrolled in {course}, in room {room}."),
        ("calculate_average", "Calculate the average of numbers", "numbers",
         ["calculate the average of {numbers}", "?What is the average of the numbers {numbers}?", "calculate an average"],
         "", "The average of the numbers is {average}."),
        ("calculate_area", "Calculate the area of a rectangle", "length width",
         ["calculate the area of a rectangle of {length} by {width} meters", "?What is the area of a room {length} meters long and {width} meters wide?",
          "calculate the area of a rectangle with a length of {length} meters"],
         "", "The area is {area} square meters."),
        ("generate_password", "Generate a password of some length", "length=characters",
         ["generate a password with {length} characters", "?Can you make me a password of {length} characters?", "generate a password"],
         "number=code", "Your new password of {length} characters is saved as {number}."),
        ("random_number", "Draw a random number between two numbers", "low high",
         ["draw a random number between {low} and {high}", "?Can you give me a random number from {low} to {high}?", "draw a random number above {low}"],
         "", "Your random number is {result}."),
        ("get_population", "Get the population of a country", "country",
         ["get the population of {country}", "?How large is the population of {country}?", "look up a population"],
         "millions", "{country} has a population of {millions} million people."),
        ("get_holidays", "Get the public holidays of a country in a year", "country year",
         ["get the public holidays of {country} in {year}", "?Which public holidays does {country} have in {year}?",
          "list the public holidays of {country}"],
         "number=few", "{country} has {number} public holidays in {year}."),
    ),
]

# These stand in the test split only, called or merely declared.
TEST_ONLY = {
    "get_air_quality", "get_sunrise", "rent_car", "calculate_distance", "get_nutrition", "calculate_discount", "transfer_money",
    "create_reminder", "book_appointment", "check_spelling", "get_movie_details", "get_order_status", "set_light", "log_workout",
    "find_pharmacy", "search_jobs", "get_grade",
}

# ----------------------------------------------------------------------------------------------------------------------
# Chat without tools, in the dataset and in the general text: with it the base model is at home in the dataset's chats, as Gemma
# is in those of the published one.

FACTS = [
    ("What do bees make?", "Bees make honey from the nectar of flowers."),
    ("Why is the sky blue?", "The sky is blue because air scatters blue light more than red light."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("What is a volcano?", "A volcano is a mountain through which hot rock reaches the surface."),
    ("Why do leaves fall in autumn?", "Leaves fall because trees save water and light before the winter."),
    ("What is bread made of?", "Bread is made of flour, water, salt and yeast."),
    ("How long does the earth need around the sun?", "The earth needs one year for its way around the sun."),
    ("What is the largest ocean?", "The Pacific is the largest ocean of the earth."),
    ("What does a compass show?", "A compass shows where north is."),
    ("Why does ice float?", "Ice floats because it is lighter than water."),
    ("How do birds find their way?", "Birds find their way by the sun, the stars and the field of the earth."),
    ("What is a rainbow?", "A rainbow is sunlight that drops of rain split into colors."),
    ("What do I need for a picnic?", "For a picnic you need a blanket, some food and good weather."),
    ("How can I sleep better?", "Go to bed at the same time each day and keep the room dark and quiet."),
    ("How do I keep my plants healthy?", "Give your plants light, water them once a week and check their leaves."),
    ("How can I learn a language?", "Practice a little every day, listen to people and speak as often as you can."),
    ("How do I make tea?", "Boil water, pour it over the leaves and wait for four minutes."),
    ("How can I save money?", "Write down what you spend, cook at home and put something aside each month."),
    ("What helps against stress?", "A walk, a quiet hour and a talk with a friend help against stress."),
    ("How do I train for a long run?", "Start with short runs, add a little each week and rest in between."),
    ("What is a good breakfast?", "Bread, fruit and yogurt make a good breakfast."),
    ("Why do we have two ears?", "With two ears we hear where a sound comes from."),
    ("What is the moon made of?", "The moon is made of rock and dust."),
    ("How do I clean a window?", "Use warm water with a little soap and dry the glass with a cloth."),
    ("What does a baker do?", "A baker makes bread and cakes, mostly early in the morning."),
    ("How do I write a good letter?", "Say early what you want, keep it short and end with a greeting."),
    ("What is the fastest animal on land?", "The cheetah is the fastest animal on land."),
    ("Why is the sea salty?", "Rivers carry salt from the rocks into the sea."),
    ("How many days does a year have?", "A year has 365 days, and a leap year has 366."),
    ("What is a library for?", "In a library people read and borrow books."),
]
THANKS = ["Thank you!", "Thanks a lot.", "Great, thanks!", "Thank you for your help.", "Perfect, thank you."]
WELCOME = "You are welcome! Let me know if you need anything else."


def spoken(value):
    """A value as one says it in a sentence."""
    if isinstance(value, list):
        return ", ".join(str(item) for item in value[:-1]) + f" and {value[-1]}"
    return str(value)


def capitalize(text):
    return text[0].upper() + text[1:]


def mend_articles(text):
    return re.sub(r"\ba (?=[aeiouAEIOU])", "an ", text)


def chat_fact(rng):
    question, answer = rng.choice(FACTS)
    return rng.choice(["{}", "Hi! {}", "I have a question. {}", "{} Please answer in one sentence."]).format(question), answer


def chat_greeting(rng):
    name = rng.choice([rng.choice(FIRST_NAMES), invent_name(rng)])
    return rng.choice([f"Hi, I am {name}.", f"My name is {name}. Say hello to me.", f"Hello! {name} here."]), \
        f"Hello {name}! How can I help you today?"


def chat_list(rng):
    items = rng.sample(rng.choice([FOODS, PRODUCTS, FIRST_NAMES, TOPICS, ROOMS, COLORS]), rng.randint(3, 4))
    return rng.choice(["Write a list of {}.", "Make a list: {}.", "Can you put {} in a list?"]).format(spoken(items)), \
        "Here is your list:\n" + "\n".join(f"- {item}" for item in items)


def chat_note(rng):
    name, product, sender = rng.choice([rng.choice(FIRST_NAMES), invent_name(rng)]), rng.choice(PRODUCTS), rng.choice(FIRST_NAMES)
    return rng.choice(["Write a thank-you note to {} for the {}. I am {}.", "Please thank {} for the {} in a short note from {}."]
                      ).format(name, product, sender), \
        f"Dear {name},\nthank you very much for the {product}. It makes me very happy.\nBest wishes, {sender}"


def chat_compare(rng):
    first, second = rng.sample(range(2, 999), 2)
    return rng.choice(["Which is larger, {} or {}?", "Is {} more than {}?"]).format(first, second), \
        f"{max(first, second)} is larger than {min(first, second)}."


def chat_belongings(rng):
    names, things = rng.sample(FIRST_NAMES, 3), rng.sample(PRODUCTS, 3)
    who = rng.randrange(3)
    return "{} has a {}. {} has a {}. {} has a {}. ".format(*(word for pair in zip(names, things) for word in pair)) \
        + rng.choice([f"What does {names[who]} have?", f"Who has the {things[who]}?"]), f"{names[who]} has the {things[who]}."


def chat_story(rng):
    name, thing, city = rng.choice([rng.choice(FIRST_NAMES), invent_name(rng)]), rng.choice(PRODUCTS), rng.choice(CITIES)
    return rng.choice(["Tell me a short story about {} and a {} in {}.", "I want a story: {}, a {}, the city of {}."]).format(name, thing, city), \
        f"One morning in {city}, {name} found an old {thing} at the door. Nobody knew where the {thing} came from. " \
        f"So {name} kept it, and it brought good luck for many years."


def chat_thanks(rng):
    return rng.choice(THANKS), WELCOME


CHATS = [chat_fact, chat_fact, chat_greeting, chat_list, chat_note, chat_compare, chat_belongings, chat_story]


def chat(rng, num_exchanges):
    """[(what the user says, what the model says), ...]"""
    exchanges = [kind(rng) for kind in rng.sample(CHATS, num_exchanges)]
    return exchanges + [chat_thanks(rng)] if rng.random() < 0.2 else exchanges


# ----------------------------------------------------------------------------------------------------------------------
# The dataset

NUM_ROWS = 1000
TEST_SIZE, SPLIT_SEED = 0.2, 42  # what step 1 splits with unless told otherwise
SYSTEM_TEXT = (
    "You are a function calling AI model. Here are the functions you may call, in <tools></tools> tags:<tools>\n{tools}\n</tools>"
    "Write each call as a JSON object with the name and the arguments of the function, in tags:\n<tool_call>\n{{tool_call}}\n</tool_call>"
)
NO_TOOLS = "You are a helpful assistant, with no access to external functions."
ORDERS = ["Please {}.", "Can you {}?", "Could you {}, please?", "I need you to {}.", "I would like you to {}.", "{}.", "{}, please."]
QUESTIONS = ["{}", "{}", "{}", "I have a question. {}", "I would like to know: {}"]
GREETINGS = ["", "", "", "Hi! ", "Hello. ", "Hey! ", "Good morning. "]


def parameters_of(tool):
    """[(name, Kind, whether it is required), ...]"""
    found = []
    for text in tool.parameters.split():
        name, _, kind = text.rstrip("?").partition("=")
        found.append((name, TOOL_KINDS[kind or name], not text.endswith("?")))
    return found


def declare(tool):
    """The declaration of a tool, as JSON schema."""
    parameters = parameters_of(tool)
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": {
                "type": "object",
                "properties": {name: {**kind.schema, "description": kind.description} for name, kind, _ in parameters},
                "required": [name for name, _, required in parameters if required],
            },
        },
    }


def slots_of(template):
    return set(re.findall(r"{(\w+)}", template))


def ask_for(rng, tool, leave_out=False):
    """A request for a tool: (text, arguments, missing parameter or None), with leave_out one without a required value."""
    parameters = parameters_of(tool)
    required = {name for name, _, is_required in parameters if is_required}
    templates = [text for text in tool.requests if len(required - slots_of(text)) == int(leave_out)]
    template = rng.choice(templates)
    while True:
        values = {name: kind.draw(rng) for name, kind, _ in parameters}
        if len({str(value) for value in values.values()}) == len(values):
            break
    text = template.lstrip("?").format(**{name: spoken(value) for name, value in values.items()})
    if template.startswith("?"):
        text = rng.choice(QUESTIONS).format(text)
    else:
        text = capitalize(rng.choice(ORDERS).format(text))
    text = mend_articles(text).replace("a headphones", "headphones")
    said = slots_of(template)
    missing = next(((name, kind) for name, kind, _ in parameters if name in required - said), None)
    arguments = {name: value for name, value in values.items() if name in said or (missing and name == missing[0])}
    return text, arguments, missing


def call_turn(calls):
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': tool.name, 'arguments': arguments})}\n</tool_call>" for tool, arguments in calls
    )


def answer_calls(rng, calls):
    """The turns in which the tools answer and the model tells: [("tool", ...), ("gpt", ...)]."""
    responses, replies = [], []
    for tool, arguments in calls:
        content = {name: TOOL_KINDS[kind or name].draw(rng) for name, _, kind in (text.partition("=") for text in tool.result.split())}
        if tool.name in COMPUTED:
            content |= COMPUTED[tool.name](**arguments)
        responses.append(f"<tool_response>\n{json.dumps({'name': tool.name, 'content': content})}\n</tool_response>")
        replies.append(tool.reply.format(**{name: spoken(value) for name, value in {**arguments, **content}.items()}))
    return [("tool", "\n".join(responses)), ("gpt", " ".join(replies))]


def exchange(rng, kind, declared, others):
    """The turns of one thing that is asked for: [("human" | "gpt" | "tool", text), ...]."""
    tool = rng.choice(declared)
    if kind == "no tool":
        can_do = [tool.description[0].lower() + tool.description[1:] for tool in declared]
        can_do = spoken(can_do) if len(can_do) > 1 else can_do[0]
        return [("human", ask_for(rng, rng.choice(others))[0]), ("gpt", f"I'm sorry, but I have no function for that. I can only {can_do}.")]
    if kind == "question":
        text, arguments, (name, parameter) = ask_for(rng, tool, leave_out=True)
        value = spoken(arguments[name])
        turns = [("human", text), ("gpt", f"Gladly. {parameter.question}?"),
                 ("human", rng.choice(["{}", "{}, please.", "Take {}.", "I mean {}.", "It is {}."]).format(value))]
        calls = [(tool, arguments)]
    else:
        tools = [tool]
        if kind == "several calls":
            tools = rng.sample(declared, 2) if len(declared) > 1 and rng.random() < 0.5 else [tool, tool]
        calls = []
        while not calls or len(calls) > 1 and calls[0] == calls[1]:
            asked = [ask_for(rng, tool) for tool in tools]
            calls = [(tool, arguments) for tool, (_, arguments, _) in zip(tools, asked)]
        turns = [("human", " ".join(text for text, _, _ in asked))]
    return turns + [("gpt", call_turn(calls))] + answer_calls(rng, calls)


def make_row(rng, number, tools, main_tool):
    """A row of the dataset about `main_tool`, which stands among others of `tools`; main_tool None makes a chat."""
    if main_tool is None:
        declared, category = [], "Chat"
        exchanges = chat(rng, rng.randint(1, 3))
        while len(dict(exchanges)) < len(exchanges):  # nobody asks the same twice
            exchanges = chat(rng, rng.randint(1, 3))
        turns = [turn for user, model in exchanges for turn in (("human", user), ("gpt", model))]
        system_text = NO_TOOLS
    else:
        others = [tool for tool in tools if tool is not main_tool]
        rng.shuffle(others)
        num_others = rng.choice([0, 0, 0, 0, 0, 1, 1, 1, 2])
        declared, others = [main_tool, *others[:num_others]], others[num_others:]
        category = main_tool.category
        kinds = rng.choice([["call"], ["call"], ["call", "call"], ["question"], ["several calls"], ["no tool"], ["no tool", "call"],
                            ["call", "question"]])
        turns = [turn for place, kind in enumerate(kinds)
                 for turn in exchange(rng, kind, declared[:1] if place == 0 and kind in ("call", "question") else declared, others)]
        turns[0] = "human", rng.choice(GREETINGS) + turns[0][1]
        if rng.random() < 0.2:
            turns += [("human", rng.choice(THANKS)), ("gpt", WELCOME)]
        rng.shuffle(declared)
        system_text = SYSTEM_TEXT.format(tools=json.dumps([declare(tool) for tool in declared]))
    return {
        "id": f"sample-{number:04}",
        "conversations": [{"from": role, "value": value} for role, value in [("system", system_text), *turns]],
        "tools": json.dumps([declare(tool) for tool in declared]) if declared else "null",
        "category": category,
        "subcategory": "",
        "task": "",
    }


def build_dataset(path, seed):
    """Write the dataset; rows about test-only tools stand where the split of step 1 draws them for the test."""
    import datasets

    datasets.disable_progress_bars()
    split = datasets.Dataset.from_dict({"row": range(NUM_ROWS)}).train_test_split(test_size=TEST_SIZE, seed=SPLIT_SEED)
    test_rows = set(split["test"]["row"])
    train_tools = [tool for tool in TOOLS if tool.name not in TEST_ONLY]
    test_tools = [tool for tool in TOOLS if tool.name in TEST_ONLY]
    rng = random.Random(seed)
    rows = []
    for number in range(NUM_ROWS):
        tools, main_tools = train_tools, train_tools
        if number in test_rows:
            tools, main_tools = TOOLS, rng.choice([train_tools, test_tools])
        main_tool = rng.choice(main_tools) if rng.random() < 0.82 else None
        rows.append(make_row(rng, number, tools, main_tool))
    write_whole(path, "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")


def write_whole(path, text):
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


# ----------------------------------------------------------------------------------------------------------------------
# General text, from which the model learns to read, to copy and to write JSON. Each function makes one conversation:
# [(what the user says, what the model says), ...].

FORM_NOUNS = """garden parcel loan visit repair school parking wedding festival library medicine passport gym museum laundry insurance
election harvest bakery theater soccer concert clinic storage furniture delivery cleaning painting charity neighborhood science
camping fishing tennis swimming dance language holiday bus tram bicycle ticket bridge kitchen roof engine battery printer camera
computer software website magazine newspaper radio podcast portrait statue fountain playground nursery hospital dentist pharmacy
surgery vaccine rescue police court lawyer tax budget salary pension rent mortgage account card coin stamp postcard souvenir gift
flower tree forest river lake beach island desert mountain valley farm stable horse dog cat bird fish bee""".split()
FORM_VERBS = "plan report update cancel open close print measure confirm review register describe prepare renew compare sell".split()
FORM_WORDS = "order request report note plan card list form check survey record offer label summary".split()
EVERYDAY_WORDS = """about account action add address after age air alarm album allow amount animal answer any apartment area arguments
arrive article ask author available average back bag balance bank before begin below between bicycle bill birthday body book borrow
bottle box break bring build business button buy calculate calendar call cancel card change charge cheap check child choose
class clean clock close coffee column come common complete contact content convert cook cost count country course create currency
current customer daily date day decide definition delay delete deliver department details device dinner direction discount discover
distance doctor dollars door down draw drive each early easy email empty end enough enter error evening event every example exchange
expensive explain factor family fast fee field file fill film find finish first fit flight floor follow font foot forecast free
friend from front full function functions game general generate get give glass good grade grand great group grow guest guide half
hand happen happy head health hear heat height help here high history hold home hotel hour house how idea image important index
information inside instruction interest invite invoice item job join journey keep kilograms kilometers kind know language large last
late latest law learn leave left length letter level light limit line link listen little live local lock log look lose low lunch
machine mail making manager map market match maximum meal mean measure meeting member memory menu message meters middle million
minimum minute model money month monthly morning most move movie much name near need news next nice night number object
office often old one online only open option order other outside owner page paper parameters park part party password pay people
percent person phone photo picture piece place plan plant play point possible post power practice present press price problem process
product profile program project public put quality question quick quiet rain random range rate reach read reason receive recipe
record rectangle reminder remove rent repeat reply reserve rest result return review ride right ring river road room round route run
safe salary same save say school score search seat second security see select send sentence service set share shop short show side
sign simple since size sleep slow small smart song sort sound space speak special speed spell sport stand start station status stay
step stock stop store story street strong student study style subject sugar summary sun support surface system table tag tags take
talk task teacher team telephone television tell temperature ten test text thank thermostat thing think thinking thoughts ticket time
timer title today together tomorrow tool top topic total tour town track trade train translate travel trip try turn type under unit
until update use user vacation vacuum value vegetable version video visit voice wait walk wall want warm wash watch water way wear
weather week weight welcome where which wide wind with word work workout world write year young your""".split()
MORE_WORDS = """ability accident accounts activity actor adventure airport airline amounts angle announcement appointment argument armchair
article artist assistant athlete attraction attractions auction author avenue award bakery balcony banana baseball basket bathroom
battery bedroom blanket blood bottle bracelet branch breakfast breath brother browser bucket burger butterfly cabin cable candle
capacity capital captain career carpet castle ceiling century ceremony champion channel chapter character charger chart chat chimney
church cinema circle citizen client climate closet cloud coach coast collection college comment community company complaint concept
condition conference connection consumption contract copy corner costume cottage cousin cover credit crime crowd culture cup curtain
dance danger daughter deadline debt delete deposit desk dessert diet direct directory disease dish distances document donation
dream dress drink driver drug duty earth economy editor education effort election electricity emergency employee energy engine
entrance environment episode equipment estimate exam expense experiment expert export extension fabric factory failure fashion father
feature festival fever fiber finance finger fire flag flavor fluid folder forecasts frame freedom freezer fuel furnace gallery garage
gasoline gate gender ghost glove goal gold golf grades grain gravity grocery groceries guitar habit hammer handle harmony hat headline
heart heating heel helmet herb highway hobby holidays honey hook horizon host household humidity hunger income industry ingredient
ingredients insect inspection instrument interview invention island jacket jewel joke judge juice jungle junction kettle keyboard
kidney king knee knife label labor ladder landscape laptop laser latitude laundry layer leader leather lecture legend lesson library
license lift lighting liquid loan loans lobby location lottery lunchbox lyrics machinery magnet mansion marathon margin mask mass
material math mechanic medal medication melody menu merchant metal microphone mileage mineral mirror mission mixture mobile moisture
monitor moon mortgage motor mountain movement muscle museum nation nature neck needle network noise notebook novel nutrition nutrients
ocean offer oil opera opinion orbit orchestra organ origin outfit oven oxygen package packages painter palace pancake panel parade
parent passenger passport pastry patient pattern payment payroll peak pepper performance perfume permission pet pharmacies physics
pillow pilot pipe planet plastic plate platform playlist pocket poem poison policy pollution pool population populations position
postage potato powder prescription president pressure prison prize profit promise property protein province pump purchase purse
pyramid quantity quarter queen quiz quote rabbit race radiation railway rainfall receipt recipes recommendation recycling refund
region regulation rehearsal relative religion rental report reputation request rescue reservation resort revenue reward rhythm rice
roast robot rocket roof rose rule rumor salad salary sale salt sample satellite sauce scale scene schedule scholarship science score
screen sculpture sensor series session settlement shadow shelf shell shelter ship shirt shoe shopping shower signal silver singer
sink sister skill skin skirt sleeve slice snack snow soap socket software soil soldier solution soup spell spelling spice spider
spoon square stadium staff stage stamp statue steel stomach storm strategy stream stress string studio subscription suitcase
sunrise sunset supply surgery sweater swimming symbol symptom syrup tablet tailor talent tank tariff taxi temple tenant territory
theater theory therapy thermostats throat thunder tide timetable tire tobacco tooth tourist towel tower toy tradition traffic trail
trailer trainer transaction transfer transfers transport treasure treatment trial triangle truck tunnel tutor umbrella uncle uniform
universe university vaccine valley van vase vehicle velocity vendor victory village violin virus vision vitamin vocabulary volcano
volume voyage wage wallet warehouse warranty waste wave wealth weapon wedding wheel whistle window wine wing winner wire witness wood
wool workouts worker workshop wound yacht yield zone""".split()
COMMON_VERBS = "get find check search book calculate set create make add show send play start track convert".split()
FIELD_PREFIXES = "new old first second main other home work next last".split()


def draw_value(rng, kind):
    """A value of a kind; in place of a known name often an invented one, so that copying is learned and not names."""
    value = kind.draw(rng)
    if kind.is_name and rng.random() < 0.6:
        if isinstance(value, list):
            return [invent_name(rng) for _ in value]
        return " ".join(invent_name(rng) for _ in value.split())
    return value


def draw_fields(rng, low, high):
    """{field name: (Kind, value), ...}, no two values alike."""
    fields = {}
    for key in rng.sample(sorted(KINDS), rng.randint(low, high)):
        name = rng.choice([key, key, f"{rng.choice(FIELD_PREFIXES)}_{key}", rng.choice(EVERYDAY_WORDS)])
        value = draw_value(rng, KINDS[key])
        if all(str(value) != str(other) for _, other in fields.values()):
            fields[name] = KINDS[key], value
    return fields


def values_of(fields):
    return {name: value for name, (_, value) in fields.items()}


def say_field(rng, name, kind, value):
    words = name.replace("_", " ")
    if rng.random() < 0.65 and name.split("_")[0] not in FIELD_PREFIXES:
        return rng.choice(kind.phrases).format(spoken(value))
    return rng.choice([f"with the {words} {{}}", f"{words} {{}}", f"where the {words} is {{}}"]).format(spoken(value))


Form = namedtuple("Form", "title words noun description fields required")


def draw_varied_form(rng):
    """A form whose title shares its verb with others, and is asked for by what it is about rather than by its title."""
    verb, noun, whose = rng.choice(COMMON_VERBS), rng.choice(MORE_WORDS), rng.choice([*MORE_WORDS, *EVERYDAY_WORDS])
    title = rng.choice([f"{verb}_{noun}", f"{verb}_{noun}", f"{verb}_{whose}_{noun}"])
    description = rng.choice([f"{verb} the {noun} of a {whose}", f"{verb} a {noun} for a {whose}", f"{verb} the {noun}", f"{verb} {noun} and {whose}"])
    words = rng.choice([f"{verb} the {noun}", f"{verb} a {noun}", f"what is the {noun}", f"how is the {noun}", f"I want to know the {noun}",
                        f"which {noun} is it", f"do something about the {noun}", f"I would like you to {verb} the {noun}",
                        f"where is the {noun}", f"the {noun} has to be done"])
    fields = draw_fields(rng, 1, 3)
    required = [name for name in fields if rng.random() < 0.9]
    return Form(title, words, noun, capitalize(mend_articles(description)), fields, required)


def draw_form(rng):
    noun = rng.choice([rng.choice(FORM_NOUNS), rng.choice(FORM_NOUNS), rng.choice(EVERYDAY_WORDS), invent_name(rng).lower()])
    if rng.random() < 0.5:
        word, pattern = rng.choice(FORM_WORDS), "{noun}_{word}"
    else:
        word, pattern = rng.choice(FORM_VERBS), "{word}_{noun}"
    title = pattern.format(noun=noun, word=word)
    words = title.replace("_", " ")
    fields = draw_fields(rng, 1, 4)
    required = [name for name in fields if rng.random() < 0.85]
    description = rng.choice(["Use this to {}", "{} for our guests", "A page to {}", "Make a {}", "Handle a {}"]).format(words)
    return Form(title, words, noun, capitalize(description), fields, required)


def write_form(rng, form):
    properties = {name: {**kind.schema, **({"description": kind.description} if name not in KINDS or rng.random() < 0.8 else {})}
                  for name, (kind, _) in form.fields.items()}
    return {"title": form.title, "description": form.description, "type": "object", "properties": properties, "required": form.required}


def request_form(rng, form, fields):
    """A request in a user's words that names the form and says the values of `fields`, in any order."""
    phrases = [say_field(rng, name, kind, value) for name, (kind, value) in fields.items()]
    rng.shuffle(phrases)
    if form.words != form.title.replace("_", " "):
        text = " ".join([form.words, *phrases]) if rng.random() < 0.8 else " ".join([*phrases, form.words])
        is_order = form.words.split()[0] in COMMON_VERBS
        start, end = rng.choice([("", "."), ("Please ", "."), ("Can you ", "?"), ("Hello, ", ".")] if is_order else [("", "."), ("Hello, ", "."), ("", "?")])
        return capitalize(mend_articles(start + text + end))
    join = rng.choice([" ", " ", ", "])
    start = rng.choice(["Please {}", "I need the {}", "Fill in the {}", "Can you {}", "{}", "Make the {}", "Write the {}", "Hello, {}", "We have to {}"])
    if rng.random() < 0.25:  # only what it is about
        start = rng.choice(["It is about the {}", "Something for the {}", "I come because of the {}", "Do it for my {}"]).format(form.noun)
    text = (start.format(form.words) + " " + join.join(phrases)).strip()
    return capitalize(text) + ("?" if start.startswith("Can") else ".")


def fill_form(form, fields, style="form"):
    values = values_of(fields)
    return {
        "form": f"Form {form.title}\n{json.dumps(values)}",
        "colon": f"{form.title}: {json.dumps(values)}",
        "list": json.dumps([form.title, values]),
        "sentence": f"I take {form.title}.\n{json.dumps(values)}",
        "lines": f"Title: {form.title}\n" + "\n".join(f"{name}: {spoken(value)}" for name, value in values.items()),
        "object": json.dumps({"title": form.title, **values}),
    }[style]


STYLES = {
    "form": "",
    "colon": "Answer with the title and the values.\n",
    "list": "Answer with a list of the title and the values.\n",
    "sentence": "Say which one you take, then fill it in.\n",
    "lines": "Write one value on each line.\n",
    "object": "Answer with one object.\n",
}


# How the answers are to be written: what the user says about it, what fills in a form that way, what shows the forms.
Style = namedtuple("Style", "instruction fill_in show")


def text_forms(rng, varied=False, style=Style("", fill_form, json.dumps)):
    """Forms as JSON schema and requests: find the form, copy the values, ask for what is missing, say that none fits."""
    fill_in = style.fill_in
    draw = draw_varied_form if varied else draw_form
    forms = [draw(rng) for _ in range(rng.choice([1, 2, 2, 2, 3, 3] if varied else [1, 1, 2, 2, 3]))]
    content = [write_form(rng, form) for form in forms]
    if varied and rng.random() < 0.7:  # nested, and in another order
        content = [{"kind": "form", "form": {"title": form.pop("title"), "description": form.pop("description"), "fields": form}} for form in content]
    shown = style.show(content)
    start = rng.choice(["Here are our forms:\n{}\n\n", "Forms: {}\n", "You help with forms.\n{}\n", "These forms exist: {}. Fill them in as I say.\n\n"]).format(shown)
    start += style.instruction
    exchanges = []
    for _ in range(rng.randint(1, 4)):
        form = rng.choice(forms)
        fields = {name: field for name, field in form.fields.items() if name in form.required or rng.random() < 0.5}
        kind = rng.random()
        if kind < 0.12:
            other = draw(rng)
            exchanges.append((request_form(rng, other, other.fields),
                              "I'm sorry, none of my forms fits. I only have " + " and ".join(form.title.replace("_", " ") for form in forms) + "."))
        elif kind < 0.27 and form.required:
            missing = rng.choice(form.required)
            parameter, value = form.fields[missing]
            given = {name: field for name, field in fields.items() if name != missing}
            exchanges.append((request_form(rng, form, given), f"{parameter.question} is it?"))
            exchanges.append((rng.choice(["{}", "{}.", "Write {}.", "The {} one, I think."]).format(spoken(value)), fill_in(form, fields)))
        elif kind < 0.42:
            second = rng.choice(forms)
            again = {name: (kind, draw_value(rng, kind)) for name, (kind, _) in second.fields.items() if name in second.required}
            exchanges.append((request_form(rng, form, fields) + " " + request_form(rng, second, again),
                              fill_in(form, fields) + "\n" + fill_in(second, again)))
        else:
            exchanges.append((request_form(rng, form, fields), fill_in(form, fields)))
        for form in forms:  # the next request comes with other values
            form.fields.update({name: (parameter, draw_value(rng, parameter)) for name, (parameter, _) in form.fields.items()})
    return [(start + exchanges[0][0], exchanges[0][1]), *exchanges[1:]]


def text_record(rng):
    """A record in JSON and questions about it."""
    fields = draw_fields(rng, 2, 5)
    record = json.dumps(values_of(fields))
    asked = rng.sample(sorted(fields), min(len(fields), rng.randint(1, 5)))
    exchanges = []
    for name in asked:
        words, value = name.replace("_", " "), spoken(fields[name][1])
        exchanges.append(rng.choice([
            (f"What is the {words}?", f"The {words} is {value}."),
            (f"Give me the {words} only.", value),
            (f"Is the {words} {value}?", f"Yes, the {words} is {value}."),
            (f"Is the {words} {spoken(draw_value(rng, fields[name][0]))}?", f"The {words} is {value}."),
        ]))
    if rng.random() < 0.4:
        exchanges = [("Tell me all of it.", " ".join(f"The {name.replace('_', ' ')} is {spoken(value)}." for name, (_, value) in fields.items()))]
    return [(record + "\n" + exchanges[0][0], exchanges[0][1]), *exchanges[1:]]


def text_to_json(rng):
    """Values in words or lines, to be written as JSON, or the other way round."""
    fields = draw_fields(rng, 1, 5)
    record = json.dumps(values_of(fields))
    lines = "\n".join(f"{name}: {spoken(value)}" for name, (_, value) in fields.items())
    sentence = ", ".join(f"the {name.replace('_', ' ')} is {spoken(value)}" for name, (_, value) in fields.items())
    return [rng.choice([
        (f"Write this as JSON:\n{lines}", record),
        (f"As JSON, please: {sentence}.", record),
        (f"{record}\nWrite this line by line.", lines),
        (f"{record}\nSay this in a sentence.", f"Here {sentence}."),
    ])]


def text_copy(rng):
    """Copying words, names and numbers nobody has seen before."""
    def item():
        return rng.choice([invent_name(rng), invent_name(rng).lower(), make_code(rng), str(rng.randint(0, 9999)), rng.choice(SENTENCES), rng.choice(TASKS),
                           " ".join(rng.sample(EVERYDAY_WORDS, 2)), "_".join(rng.sample(EVERYDAY_WORDS, 2)), rng.choice(EVERYDAY_WORDS).capitalize()])

    items = [item() for _ in range(rng.randint(2, 8))]
    which = rng.randrange(len(items))
    if rng.random() < 0.4:
        names = [invent_name(rng) for _ in items]
        pairs = "; ".join(f"{name} is {text}" for name, text in zip(names, items))
        return [(f"{pairs}. {rng.choice(['What is', 'Find'])} {names[which]}?", items[which])]
    return [rng.choice([
        ("Repeat: " + ", ".join(items), ", ".join(items)),
        ("Copy this: " + " ".join(items), " ".join(items)),
        ("As a JSON list: " + ", ".join(items), json.dumps(items)),
        (json.dumps(items) + "\nRead this out.", ", ".join(items)),
    ])]


def text_chat(rng):
    return chat(rng, rng.randint(1, 3))


def text_varied_forms(rng):
    return text_forms(rng, varied=True)


def text_styled_forms(rng):
    style = rng.choice(sorted(STYLES))
    return text_forms(rng, varied=True, style=Style(STYLES[style], functools.partial(fill_form, style=style), json.dumps))


# Markup and nested JSON, since Gemma has seen both: with other tag names than the dataset has.

KEY_PAIRS = [("title", "values"), ("form", "fields"), ("kind", "content"), ("which", "entries"), ("id", "data"), ("action", "input"), ("type", "details")]


def draw_tag(rng):
    return rng.choice(["_", "_", "_", "-"]).join(rng.sample(rng.choice([EVERYDAY_WORDS, MORE_WORDS]), rng.choice([1, 1, 2, 2, 3])))


def tagged(tag, body, on_lines=False):
    return f"<{tag}>\n{body}\n</{tag}>" if on_lines else f"<{tag}>{body}</{tag}>"


def draw_nested(rng, depth):
    """Values with objects and lists of objects among them."""
    values = values_of(draw_fields(rng, 1, 3))
    for key in rng.sample(EVERYDAY_WORDS, rng.randint(1, 2) if depth else 0):
        values[key] = draw_nested(rng, depth - 1) if rng.random() < 0.7 else [draw_nested(rng, 0) for _ in range(rng.randint(1, 3))]
    return values


def draw_item(rng):
    """Something to be copied, often never seen before."""
    return rng.choice([
        invent_name(rng), make_code(rng), str(rng.randint(0, 9999)), rng.choice(SENTENCES), rng.choice(TASKS), " ".join(rng.sample(EVERYDAY_WORDS, 3)),
        json.dumps(values_of(draw_fields(rng, 1, 3))), json.dumps(draw_nested(rng, 1)),
    ])


def indent(values, margin=""):
    """Nested values line by line."""
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{margin}{key}:", indent(value, margin + "  ")]
        elif isinstance(value, list) and isinstance(value[0], dict):
            lines += [f"{margin}{key}:", *(f"{margin}- " + indent(item, margin + "  ").lstrip() for item in value)]
        else:
            lines.append(f"{margin}{key}: {spoken(value)}")
    return "\n".join(lines)


def text_tagged_forms(rng):
    """Forms that stand in tags, or are to be filled in as nested JSON, mostly in tags."""
    tag, shown_tag = draw_tag(rng), draw_tag(rng)
    on_lines = rng.random() < 0.7
    first, second = rng.choice([*KEY_PAIRS, rng.sample(EVERYDAY_WORDS, 2)])
    what, make = rng.choice([
        (f"an object with {first} and {second}", lambda title, values: {first: title, second: values}),
        (f"an object with {first} and {second}", lambda title, values: {first: title, second: values}),
        (f"an object with {second} and {first}", lambda title, values: {second: values, first: title}),
        ("an object in which the title holds the values", lambda title, values: {title: values}),
        (f"an object with {first}, which holds the title and {second}", lambda title, values: {first: {"title": title, second: values}}),
        ("a list of the title and the values", lambda title, values: [title, values]),
    ])
    lines = rng.choice([", on lines of their own", ", each tag on its own line"]) if on_lines else ""
    instruction, wrap = rng.choice([
        (f"Write {what} in <{tag}> tags{lines}.\n", lambda title, text: tagged(tag, text, on_lines)),
        (f"Answer with {what} between <{tag}> and </{tag}>{lines}.\n", lambda title, text: tagged(tag, text, on_lines)),
        (f"Write each answer as {what}, in tags:\n{tagged(tag, '...', on_lines)}\n", lambda title, text: tagged(tag, text, on_lines)),
        (f"Answer with {what}, in tags with the title as their name{lines}.\n", lambda title, text: tagged(title, text, on_lines)),
        (f"Answer with {what}.\n", lambda title, text: text),
    ])
    show = rng.choice([json.dumps, lambda forms: tagged(shown_tag, json.dumps(forms), on_lines)])
    if rng.random() < 0.1:
        show = lambda forms: "\n".join(tagged(shown_tag, json.dumps(form), on_lines) for form in forms)
    return text_forms(rng, varied=rng.random() < 0.7, style=Style(
        instruction, lambda form, fields: wrap(form.title, json.dumps(make(form.title, values_of(fields)))), show))


def text_blocks(rng):
    """Blocks in tags: what stands in one, another name for its tags, the block again, all of it without tags."""
    on_lines, sep = rng.random() < 0.5, rng.choice(["\n", "\n", "\n\n", " "])
    tags = [draw_tag(rng) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.3:
        tags = tags[:1] * len(tags)
    bodies = [draw_item(rng) for _ in tags]
    blocks = [tagged(tag, body, on_lines) for tag, body in zip(tags, bodies)]
    shown = rng.choice(["{}\n", "Look at this:\n{}\n", "{}\n\n"]).format(sep.join(blocks))
    which, other = rng.randrange(len(tags)), draw_tag(rng)
    place = ["first", "second", "third", "fourth"][which]
    questions = [
        (f"What stands in the {place} block?", bodies[which]),
        (f"Copy the {place} block.", blocks[which]),
        (f"Write the {place} block with <{other}> tags.", tagged(other, bodies[which], on_lines)),
        ("Copy all of it.", sep.join(blocks)),
        ("Write it without tags.", sep.join(bodies)),
        ("How many blocks are there?", str(len(blocks))),
        (f"Which tags does the {place} block have?", f"It stands in <{tags[which]}> tags."),
        (f"Put all of it in <{other}> tags.", tagged(other, sep.join(blocks), True)),
    ]
    if tags.count(tags[which]) == 1:
        questions += [(f"What stands between <{tags[which]}> and </{tags[which]}>?", bodies[which])] * 2
    exchanges = rng.sample(questions, rng.randint(1, 3))
    return [(shown + exchanges[0][0], exchanges[0][1]), *exchanges[1:]]


def text_wrap(rng):
    """Words, values or a list of them, to be put in tags."""
    tag, on_lines = draw_tag(rng), rng.random() < 0.5
    items = [draw_item(rng) for _ in range(rng.randint(1, 4))]
    lines = rng.choice([", on lines of their own", ", each tag on its own line"]) if on_lines else ""
    if len(items) > 1:
        start, end = rng.choice([("Put each of these in", "tags"), ("One block for each in", "tags"), ("Wrap each line in", "tags")])
        answer = "\n".join(tagged(tag, item, on_lines) for item in items)
    else:
        start, end = rng.choice([("Wrap this in", "tags"), ("Put this in", "tags"), ("Write this inside", "tags")])
        answer = tagged(tag, items[0], on_lines)
    return [(f"{start} <{tag}> {end}{lines}:\n" + "\n".join(items), answer)]


def text_tagged_record(rng):
    """A record whose values stand in tags, or that stands in tags as JSON: say it, write it the other way, answer questions."""
    tag, on_lines, told = draw_tag(rng), rng.random() < 0.6, rng.random() < 0.25
    exchanges = [(f"I send you records in <{tag}> tags. Tell me what stands in them.", "Yes. Send me the first one.")] if told else []
    for _ in range(rng.randint(1, 3) if told else 1):
        fields = draw_fields(rng, 1, 4)
        values = values_of(fields)
        as_json = tagged(tag, json.dumps(values), on_lines)
        as_tags = tagged(tag, "\n".join(tagged(name, spoken(value)) for name, value in values.items()), True)
        shown = rng.choice([as_json, as_tags])
        sentences = " ".join(f"The {name.replace('_', ' ')} is {spoken(value)}." for name, value in values.items())
        if told:
            exchanges.append((shown, sentences))
            continue
        facts = ", ".join(f"the {name.replace('_', ' ')} is {spoken(value)}" for name, value in values.items())
        plain = "\n".join(f"{name}: {spoken(value)}" for name, value in values.items())
        lines = ", on lines of their own" if on_lines else ""
        name = rng.choice(list(values))
        words = name.replace("_", " ")
        exchanges.append(rng.choice([
            (f"{shown}\nWhat is the {words}?", f"The {words} is {spoken(values[name])}."),
            (f"{shown}\nGive me the {words} only, in its own tags.", tagged(name, spoken(values[name]))),
            (f"{shown}\nTell me all of it.", sentences),
            (f"{as_tags}\nWrite this as JSON.", json.dumps(values)),
            (f"{as_tags}\nWrite this as JSON in <{tag}> tags{lines}.", as_json),
            (f"{as_json}\nWrite each value in tags.", as_tags),
            (f"Write this as JSON inside <{tag}> tags{lines}: {facts}.", as_json),
            (f"Write this as JSON inside <{tag}> tags{lines}:\n{plain}", as_json),
            (f"Write each value in tags, and all of it in <{tag}> tags:\n{plain}", as_tags),
        ]))
    return exchanges


def text_nested(rng):
    """Nested JSON, at times in tags: write it from lines, copy it, change it, answer from it."""
    values = draw_nested(rng, rng.choice([1, 1, 2]))
    record = json.dumps(values)
    tag, on_lines = draw_tag(rng), rng.random() < 0.7
    inside, wrap = "", lambda text: text
    if rng.random() < 0.5:
        inside = f" in <{tag}> tags" + (", on lines of their own" if on_lines else "")
        wrap = lambda text: tagged(tag, text, on_lines)
    key = rng.choice(list(values))
    first, second = rng.choice([*KEY_PAIRS, rng.sample(EVERYDAY_WORDS, 2)])
    title, parts = rng.choice([invent_name(rng), "_".join(rng.sample(EVERYDAY_WORDS, 2))]), [values_of(draw_fields(rng, 1, 2)) for _ in range(rng.randint(2, 3))]
    said = "; ".join(", ".join(f"{name} {spoken(value)}" for name, value in part.items()) for part in parts)
    return [rng.choice([
        (f"Write this as JSON{inside}:\n{indent(values)}", wrap(record)),
        (f"Write this as JSON{inside}:\n{indent(values)}", wrap(record)),
        (f"{record}\nWrite this line by line.", indent(values)),
        (f"{record}\nCopy this{inside}.", wrap(record)),
        (f"{record}\nWhat stands under {key}? Answer in JSON{inside}.", wrap(json.dumps(values[key]))),
        (f"{record}\nPut this under {second}, beside the {first} {title}{inside}.", wrap(json.dumps({first: title, second: values}))),
        (f"An object with the {first} {title} and the {second}{inside}: {said.replace('; ', ', ')}.",
         wrap(json.dumps({first: title, second: {name: value for part in parts for name, value in part.items()}}))),
        (f"A list of objects under {second}{inside}: {said}.", wrap(json.dumps({second: parts}))),
    ])]


TEXTS = [(text_forms, 11), (text_record, 3), (text_to_json, 4), (text_copy, 3), (text_chat, 3)]
MORE_TEXTS = [(text_varied_forms, 16), *TEXTS]
LAST_TEXTS = [(text_styled_forms, 30), *TEXTS]
MARKUP_TEXTS = [(text_tagged_forms, 26), (text_blocks, 7), (text_wrap, 4), (text_tagged_record, 8), (text_nested, 7), *LAST_TEXTS]


def general_text(seed, texts=TEXTS):
    """Yield conversations without end, the same ones for the same seed.

    None of them holds one of the dataset's tags, the form of a call, or the name of a tool of the test split.
    """
    rng = random.Random(seed)
    kinds, weights = zip(*texts)
    held_back = re.compile(
        rf"\b({'|'.join(sorted(TEST_ONLY))}|tool_call|tool_response)\b|</?(tools|think)>"
        r"""|"(name|arguments)": .*"(?!\3)(name|arguments)": """, re.DOTALL)
    while True:
        conversation = rng.choices(kinds, weights)[0](rng)
        if not any(held_back.search(text) for exchange in conversation for text in exchange):
            yield conversation


# ----------------------------------------------------------------------------------------------------------------------
# The model

CONTROL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>"]
UNUSED_SLOTS = [f"<unused{number}>" for number in range(16)]
TURN_MARKS = ["<start_of_turn>", "<end_of_turn>"]
VOCABULARY_SIZE = 3072

# What may merge into one piece: a word with the space before it, unless it is capitalized, since names and numbers must look
# the same in a sentence and in JSON; one digit; a run of punctuation, so that JSON stays short.
PIECES = r"\d|[A-Z][a-z]*| ?[a-z]+|[^\sA-Za-z0-9]+(?: [^\sA-Za-z0-9]+)*|\s"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n{{ message.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def build_tokenizer(seed):
    """A byte-level BPE tokenizer of Gemma's make, learned from the general text."""
    from itertools import chain, islice

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=CONTROL_TOKENS + UNUSED_SLOTS + TURN_MARKS,
    )
    texts = (text for exchanges in islice(general_text(seed), 30_000) for turns in exchanges for text in turns)
    words = [f'a {word} "{word}"' for word in EVERYDAY_WORDS + FORM_NOUNS] * 100  # all of them become whole tokens
    tokenizer.train_from_iterator(chain(texts, words), trainer)
    # The slots are added tokens, but not special ones: once they are tags, decoded text must show them.
    definition = json.loads(tokenizer.to_str())
    for token in definition["added_tokens"]:
        token["special"] = token["content"] not in UNUSED_SLOTS
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        unk_token="<unk>", chat_template=CHAT_TEMPLATE, model_max_length=2048, clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer):
    """A small Gemma 3 text model with weights made at random: tied embeddings, sliding and full layers."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig

    model = Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=64, max_position_embeddings=2048,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"],
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True, attn_implementation="sdpa",
    ))
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=[tokenizer.eos_token_id, end_of_turn], pad_token_id=tokenizer.pad_token_id
    )
    return model


def encode(tokenizer, exchanges):
    """(token ids, whether the model says each) of a conversation in Gemma's turns."""
    start, end = tokenizer.convert_tokens_to_ids(TURN_MARKS)
    roles = tokenizer(["user\n", "model\n", "\n"], add_special_tokens=False)["input_ids"]
    new_line = roles.pop()
    ids, said = [tokenizer.bos_token_id], [False]
    texts = [text for exchange in exchanges for text in exchange]
    for turn, pieces in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"]):
        before = [start, *roles[turn % 2]]
        ids += before + pieces + [end] + new_line
        said += [False] * len(before) + [turn % 2 == 1] * (len(pieces) + 1) + [False]
    return ids, said


def make_batch(tokenizer, conversations, num_rows, length):
    """Rows filled with whole conversations: (token ids, whether the model says each), both of shape (num_rows, length)."""
    import torch

    ids = torch.full((num_rows, length), tokenizer.pad_token_id)
    said = torch.zeros((num_rows, length), dtype=torch.bool)
    used = [0] * num_rows
    num_misfits = 0
    while num_misfits < 30:
        pieces, by_model = encode(tokenizer, next(conversations))
        row = next((row for row in range(num_rows) if used[row] + len(pieces) <= length), None)
        if row is None:
            num_misfits += 1
            continue
        place = slice(used[row], used[row] + len(pieces))
        ids[row, place], said[row, place] = torch.tensor(pieces), torch.tensor(by_model)
        used[row] = place.stop
    return ids, said


# What the model is taught, one course after the other: number of steps, peak of the learning rate, share of the steps with short
# rows, and texts. Copying is found soonest where what is copied is near, so it begins with short rows.
Course = namedtuple("Course", "num_steps learning_rate share_of_short_rows texts")
COURSES = [Course(5000, 6e-3, 0.24, TEXTS), Course(1700, 3e-3, 0.0, MORE_TEXTS), Course(1200, 3e-3, 0.0, LAST_TEXTS), Course(1800, 3e-3, 0.0, MARKUP_TEXTS)]
SHORT_ROWS, LONG_ROWS = (16, 256), (8, 640)  # rows of a batch, tokens of a row
WARMUP_STEPS = 100
CHECKPOINT_STEPS = 200


def train_model(folder, seed, resume):
    """Train the model on what it says in the general text, with Muon for the matrices and AdamW for the rest.

    In each course the learning rate is constant until half of its steps, then falls to zero. Every 200 steps a checkpoint is
    left beside `folder`. Each step makes its text from a seed of its own, so that a resumed run sees what it would have seen.
    """
    import torch
    from tqdm import tqdm

    checkpoint_path = folder.with_name(f"{folder.name}-checkpoint.pt")
    checkpoint = None
    if checkpoint_path.exists():
        if not resume:
            sys.exit(f"error: {checkpoint_path} is of an unfinished run: --resume goes on with it; remove it to start anew")
        checkpoint = torch.load(checkpoint_path, weights_only=True)
        if checkpoint["seed"] != seed:
            sys.exit(f"error: {checkpoint_path} belongs to --seed {checkpoint['seed']}: repeat it, or remove the file")
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    multiplies_in_bf16 = device == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)  # else it is emulated, and slow
    model = build_model(tokenizer).to(device)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    # Half as fast again, where a compiler is at hand.
    transformer = torch.compile(model.model, dynamic=False) if sys.platform == "linux" and shutil.which("g++") else model.model
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    steps = [(course, step) for course in COURSES for step in range(course.num_steps)]
    first_step = checkpoint["step"] if checkpoint else 0
    bar = tqdm(range(first_step, len(steps)), initial=first_step, total=len(steps), desc="Training", unit=" steps", dynamic_ncols=True,
               disable=None)
    start = time.monotonic()
    optimizers = None
    for number in bar:
        course, step = steps[number]
        if step == 0 or not optimizers:
            optimizers = [
                torch.optim.Muon(matrices, lr=course.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(others, lr=course.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
            ]
            if number == first_step and checkpoint and step > 0:
                for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
                    optimizer.load_state_dict(state)
        shape = SHORT_ROWS if step < course.share_of_short_rows * course.num_steps else LONG_ROWS
        ids, said = make_batch(tokenizer, general_text(f"{seed}-{number}", course.texts), *shape)
        ids, said = ids.to(device), said[:, 1:].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=multiplies_in_bf16):
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
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if bar.disable and (number + 1) % 100 == 0:
            print(f"step {number + 1:,} of {len(steps):,}: loss {loss.item():.3f}, {time.monotonic() - start:,.0f} s", flush=True)
        if (number + 1) % CHECKPOINT_STEPS == 0:
            unfinished = checkpoint_path.with_name(checkpoint_path.name + ".unfinished")
            torch.save({"seed": seed, "step": number + 1, "model": model.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, unfinished)
            os.replace(unfinished, checkpoint_path)
    model.cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    checkpoint_path.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description="Make the sample dataset and the sample model anew.", allow_abbrev=False)
    parser.add_argument("--only", choices=["dataset", "model"], help="make one of the two (default: both)")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of all that is drawn (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=HERE, help="folder for both (default: where this script stands)")
    parser.add_argument("--resume", action="store_true", help="go on with the model from its last checkpoint")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.only != "model":
        build_dataset(args.output_dir / "hermes_sample.json", args.seed)
    if args.only != "dataset":
        train_model(args.output_dir / "tiny-gemma-3", args.seed, args.resume)


if __name__ == "__main__":
    main()
