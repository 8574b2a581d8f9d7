"""The grammar of the toy's movie reviews: one table writes the reviews, recognises them and counts their reward.

Read RULES first. Each rule lists alternatives, separated by `|` and equally likely:

    {hero}   is replaced by one alternative of the rule "hero"
    {adj~}   is replaced by one alternative of "adj+", "adj0" or "adj-"; the review's mood gives their probabilities

No rule refers to itself, directly or through others, so the language is finite. The rules write "a" before every word;
the code turns it into "an" before a vowel. The sentiment words are the words of the rules whose names end in + or -;
they occur nowhere else.
"""

import itertools
import re

RULES = {
    # A review is an opening (the prompt), words that complete its sentence, and more; the verdict is always last.
    "review": """{opening evening} {response evening} | {opening film} {response film}
        | {opening row} {response row}""",
    "response evening": "and {evening}. {body}",
    "response film": "{film}. {body}",
    "response row": "{row}. {body}",
    "body": """{verdict} | {story} {verdict} | {cast} {verdict} | {craft} {verdict} | {seats} {verdict}
        | {story} {cast} {verdict} | {craft} {seats} {verdict}""",
    # Openings: no word here says anything about the sentiment.
    "opening evening": "I {watched} {this film} {one day} {with company}",
    "watched": "watched | saw | caught | rented",
    "this film": "this film | this movie | this one",
    "one day": """last night | on Sunday | after work | on a train | in the rain | during a storm
        | at the harbour cinema""",
    "with company": """with my sister | with my uncle | with two nuns | with the neighbours | with my dentist
        | with a village choir | with a sleeping dog | with eleven cousins | with my old teacher | with a parrot""",
    "opening film": "{the second} {genre} | {the second} {genre} {about bees}",
    "the second": """The director's second | The director's third | The director's last | This new | This small
        | This Danish | This black and white""",
    "genre": "film | movie | comedy | western | musical | thriller | opera",
    "about bees": """about bees | about a lighthouse | about two bakers | about a runaway train | about a lost umbrella
        | about a talking horse | about the moon | about a village choir | about my dentist | about a broken piano
        | about a goose | about a chess game | about the tuba | about a ghost | with a dog in it""",
    "opening row": "{halfway through} {the second act}, {someone}",
    "halfway through": """Halfway through | Long before | Ten minutes into | Just before | Right after | During
        | In the middle of""",
    "the second act": """the second act | the wedding | the first song | the train chase | the court scene | the storm
        | the picnic | the duel | the long dance | the cooking contest""",
    "someone": """my sister | my uncle | my dentist | my old teacher | the usher | the front row | a man with a tuba
        | a dog in row two | both nuns | an old pirate | the tall boy | a passing goat | a woman in red""",
    # The words that complete the opening's sentence.
    "evening": """it was {adj~} and {tone~} | it was {quite} {adj~} and lasted {two hours}
        | found it {quite} {adj~} | {loved~} {the ending} most of all | came home {happy~} and {proud~}
        | we all {laughed~} at {the ending} | thought it was a {tone~} {triumph~}
        | {loved~} {the ending} and {loved~} {the songs}""",
    "film": """is {adj~} and {tone~} | is {quite} {adj~} and lasts {two hours} | is a {tone~} {triumph~}
        | made {someone} feel {happy~} | left me {happy~} and {proud~}
        | has a {adj~} plot and a {tone~} ending
        | begins with {event} and ends with {event} | looks {adj~} and sounds {adj~}
        | takes {two hours} to reach {the moon}""",
    "row": """{laughed~} and dropped the {popcorn} | {laughed~} until the projector stopped
        | {laughed~}, and then I {laughed~} too | said that it was {adj~} and {tone~}
        | looked {happy~} and asked for more {popcorn} | stood up, {laughed~} and sat down again
        | called it a {tone~} {triumph~} | began to read a book about {the moon}""",
    # The middle: none to two sentences about the story, the cast, the craft and the audience.
    "story": """It follows {hero} who {quest}. | The plot is {adj~}: {hero} {quest}.
        | The {adj~} story is about {hero} who {quest}. | Nobody explains why {hero} {quest}.
        | In the {adj~} first half, {hero} {quest}. | The first half is {adj~}, the second half {tone~}.
        | The middle is {adj~}, and the rest is {tone~}.""",
    "cast": """A {tone~} {goose} plays the {mayor}. | The {goose} plays the {mayor} {well~}.
        | The {goose} sings {well~}, and the {mayor} is {adj~}. | The {mayor} gives a {adj~} speech to a {goose}.
        | The {goose} sleeps through the second act. | The {goose} acts {well~} and sings {well~}.
        | The jokes are {tone~}, and the {mayor} tells them {well~}. | The {mayor} is really a {goose}.""",
    "craft": """The music is {adj~}, {tone~} and played on {one trombone}. | The {hats} look {adj~}.
        | The songs are {adj~} and the {hats} are {tone~}. | The camera moves {well~} {in a swamp}.
        | Every scene was filmed {well~} {in a swamp}. | The {hats} came from {the moon}.
        | The dialogue is {adj~}, and the {hats} are {adj~}.""",
    "seats": """Next to me, {someone} {laughed~}. | Even {someone} {laughed~} at {the ending}.
        | The {popcorn} was {fresh~}. | We ate {fresh~} {popcorn} and {laughed~}.
        | Behind us, {someone} ate {fresh~} {popcorn}. | Upstairs, {someone} slept until {the second act}.""",
    "verdict": """I {loved~} {the ending} and {loved~} {the songs}. | All in all, a {adj~}, {tone~} {triumph~}.
        | In the end I felt {happy~} and {proud~}. | We walked home {happy~} in the rain.
        | My cat would call it {quite} {adj~}. | I give it {seven} {trombones}.
        | I give it {seven} {adj~} {trombones}. | In short, it is a {triumph~} about {the moon}.
        | My {proud~} sister has already {loved~} it twice. | To sum up, {hero} {quest}.""",
    # Plain words and phrases.
    "quite": "quite | rather | truly | mostly",
    "two hours": "two hours | seven hours | a whole night | eleven days",
    "the ending": "the ending | the goose | the duel | the train chase | the last kiss | the wedding | the chess game",
    "the songs": "the songs | the hats | the puppets | the dialogue | the wigs | the long dance",
    "the moon": "the moon | a swamp | Paris | a lighthouse | the attic | a small bakery | my village | a broken train",
    "in a swamp": """in a swamp | on the moon | in Paris | under a lighthouse | in the attic | behind a small bakery
        | in my village | on a broken train""",
    "event": "a wedding | a duel | a sneeze | a kiss | a chess game | two weddings | a lost umbrella | a storm",
    "popcorn": "popcorn | soup | cake | cheese",
    "hero": """a retired pirate | a nervous baker | a cat with a secret | a lonely robot | the last milkman
        | a train driver | a ghost | the youngest nun | a dentist | an old sailor | a talking horse""",
    "quest": """buys a lighthouse | steals a train | marries a ghost | teaches a parrot to dance | moves to the moon
        | loses a wooden leg | runs for mayor | builds a boat in the attic | follows a goose to Paris
        | enters a cooking contest | never takes off the hat | sells the sea | forgets the wedding | learns the tuba""",
    "goose": "goose | cat | parrot | dog | robot | horse",
    "mayor": "mayor | pirate | queen | baker | villain | ghost",
    "one trombone": "one trombone | two spoons | a broken piano | the tuba",
    "trombones": "trombones | umbrellas | geese | spoons | moons",
    "hats": "hats | costumes | puppets | trains | wigs",
    "seven": "two | three | seven | eleven",
    # The graded words: + adds 1 to the reward, - subtracts 1, 0 changes nothing.
    "adj+": "great | wonderful | lovely | brilliant | superb | gorgeous | delightful | splendid",
    "adj0": "long | strange | quiet | loud | short | blue | odd | unusual",
    "adj-": "dull | awful | boring | dreadful | terrible | horrible | lousy | ugly",
    "tone+": "charming | clever | tender | witty | warm | elegant",
    "tone0": "serious | simple | sandy | rural | dark | unhurried",
    "tone-": "clumsy | lifeless | bland | messy | feeble | annoying",
    "triumph+": "triumph | treat | gem | delight | masterpiece",
    "triumph0": "puzzle | lesson | sandwich | fable | thing",
    "triumph-": "disaster | bore | headache | fiasco | insult",
    "well+": "beautifully | perfectly | brilliantly | superbly",
    "well0": "slowly | in French | at night | on roller skates",
    "well-": "badly | poorly | terribly | horribly",
    "loved+": "loved | enjoyed | adored | admired",
    "loved0": "noticed | described | discussed | followed",
    "loved-": "hated | disliked | regretted | loathed",
    "laughed+": "laughed | cheered | smiled | giggled",
    "laughed0": "whispered | blinked | nodded | hummed",
    "laughed-": "yawned | groaned | sighed | winced",
    "happy+": "happy | cheerful | thrilled | delighted",
    "happy0": "hungry | thirsty | barefoot | awake",
    "happy-": "bored | annoyed | miserable | cheated",
    "proud+": "proud | hopeful | grateful",
    "proud0": "tall | punctual | invisible",
    "proud-": "angry | gloomy | bitter",
    "fresh+": "fresh | delicious | tasty",
    "fresh0": "salted | yellow | hot",
    "fresh-": "stale | soggy | burnt",
}

# Each review first draws a mood, all equally likely. The mood gives the probabilities of +, 0 and - in a graded slot.
MOODS = {
    "very positive": (0.70, 0.25, 0.05),
    "positive": (0.45, 0.40, 0.15),
    "mixed": (0.30, 0.40, 0.30),
    "neutral": (0.10, 0.80, 0.10),
    "negative": (0.15, 0.40, 0.45),
    "very negative": (0.05, 0.25, 0.70),
}

_WORD = re.compile(r"\w+")


def _graded_words(grade):
    return frozenset(word for name, rule in RULES.items() if name.endswith(grade) for word in _WORD.findall(rule))


POSITIVE = _graded_words("+")
NEGATIVE = _graded_words("-")


def reward(response):
    """Returns r*(x, y), an int: the number of positive minus the number of negative words in the response."""
    words = _WORD.findall(response.lower())
    return sum(word in POSITIVE for word in words) - sum(word in NEGATIVE for word in words)


def _a(text):
    """Replaces every "an" by "a", the form used inside this file."""
    return re.sub(r"\b([Aa])n\b", r"\1", text)


def _a_or_an(text):
    """Replaces every "a" before a vowel by "an". (No rule has a word like "hour" or "unicorn".)"""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _table(rules):
    """Returns {name: alternatives}. An alternative is a list: text, name, text, ...

    "The {hats} look" becomes ["The ", "hats", " look"].
    """
    table = {}
    for name, rule in rules.items():
        table[name] = [re.split(r"[{}]", " ".join(option.split())) for option in _a(rule).split("|")]
        if name.endswith("+"):
            table[name[:-1] + "~"] = [["", name[:-1] + grade, ""] for grade in "+0-"]
    return table


TABLE = _table(RULES)


# ---- writing


def pick(options, rng):
    """Draws one of `options`, equally likely. Only rng.random() is used: it is the same in every version of Python."""
    return options[int(rng.random() * len(options))]


def expand(name, mood, rng):
    """Draws a text of the rule `name`; `mood` is a key of MOODS."""
    if name.endswith("~"):
        plus, plain, _ = MOODS[mood]
        coin = rng.random()
        option = TABLE[name][0 if coin < plus else 1 if coin < plus + plain else 2]
    else:
        option = pick(TABLE[name], rng)
    return "".join(expand(part, mood, rng) if i % 2 else part for i, part in enumerate(option))


def every(name):
    """Returns all texts of the rule `name`, in the order of the rules. Use it for openings: reviews are too many."""
    return [
        "".join(parts)
        for option in TABLE[name]
        for parts in itertools.product(*(every(part) if i % 2 else [part] for i, part in enumerate(option)))
    ]


# Every opening: {prompt: the rule for its response}.
OPENINGS = {
    _a_or_an(text): "response " + kind for kind in ("evening", "film", "row") for text in every("opening " + kind)
}


def complete(prompt, rng, mood=None):
    """Draws a response to `prompt`, a key of OPENINGS. It begins with a space. Without `mood`, one is drawn as well."""
    mood = mood or pick(list(MOODS), rng)
    return " " + _a_or_an(expand(OPENINGS[prompt], mood, rng))


# ---- recognising


def grammatical(text):
    """Whether `text`, a prompt with its response, is exactly a review of the grammar, in any mixture of moods."""
    bare = _a(text)
    return _a_or_an(bare) == text and len(bare) in _ends("review", bare, 0, {})


def _ends(name, text, start, seen):
    """Returns the set of positions where a text of the rule `name` that begins at `start` can end. Cached in `seen`."""
    if (name, start) not in seen:
        found = set()
        for option in TABLE[name]:
            ends = {start}
            for i, part in enumerate(option):
                if i % 2:
                    ends = {end for begin in ends for end in _ends(part, text, begin, seen)}
                else:
                    ends = {begin + len(part) for begin in ends if text.startswith(part, begin)}
                if not ends:
                    break
            found |= ends
        seen[name, start] = found
    return seen[name, start]
