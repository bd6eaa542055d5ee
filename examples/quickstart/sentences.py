"""English sentences from templates: short, grammatical, broad in phonemes, endless in number.

The templates span some 10^7 sentences, so two seeds share next to none: a test split drawn
with one seed is new to a model trained on another.
"""

import random
import string

_TEMPLATES = (
    "{name} {past} the {adjective} {noun} {when}.",
    "The {adjective} {noun} {moved} {where}.",
    "{number} {adjective} {plural} {moved} {where}.",
    "Please {verb} the {noun} {when}.",
    "Did {name} {verb} the {adjective} {noun}?",
    "Why would {name} {verb} {number} {plural}?",
    "{when}, the {noun} {moved} {where}.",
    "My {person} {past} {number} {plural} {where}.",
    "Nobody {past} that {adjective} {noun}.",
    "{name} and her {person} {moved} {where}.",
    "Can you {verb} our {noun} {where}?",
    "His {person} never {past} the {plural}.",
    "I {past} those {adjective} {plural} {when}.",
    "We should {verb} the {noun}, {name}.",
)

_WORDS = {
    field: [word.strip() for word in words.split(",")]
    for field, words in {
        "name": """
            Agnes, Boris, Charlotte, Dorothy, Ethan, Fiona, George, Heather, Isaac, Joyce, Keith,
            Laura, Matthew, Naomi, Oliver, Paul, Quentin, Ruth, Sheila, Theo, Ursula, Victor,
            Wendy, Xavier, Yvonne, Zoe
        """,
        "person": """
            aunt, brother, cousin, daughter, doctor, father, friend, judge, lawyer, mother, nephew,
            neighbour, partner, sister, teacher, uncle, boyfriend, nurse
        """,
        "noun": """
            garage, umbrella, violin, treasure, jacket, kitchen, mirror, bridge, feather, guitar,
            oyster, engine, cushion, thimble, wagon, yacht, zebra, chair, measure, pudding,
            sausage, vision, rhythm, tower, coin, bath, beach, cloth, fish, garden, hedge, judge,
            leather, moth, ocean, puzzle, queen, rocket, shoulder, tooth, valley, whistle, yolk,
            onion, boy, cow
        """,
        "plural": """
            apples, badges, cherries, dishes, envelopes, foxes, gloves, houses, islands, jewels,
            kettles, lemons, mouths, noises, oranges, paths, quilts, roses, sheep, thieves,
            urchins, voices, watches, yards, zones, books, boots, birds, toys, clouds, pears,
            beards, tours
        """,
        "adjective": """
            ancient, beige, cheap, dusty, easy, fuzzy, gentle, huge, icy, jolly, kind, loud, mild,
            narrow, odd, pure, quiet, rough, smooth, thick, usual, vast, weird, young, zesty,
            noisy, brown, royal, foreign, cool, warm, Asian, shy, early, northern, loyal, absurd
        """,
        "past": """
            admired, borrowed, chose, described, enjoyed, finished, gathered, heard, ignored,
            judged, kept, loathed, measured, noticed, offered, painted, questioned, refused, shook,
            thanked, understood, valued, watched, yanked, zipped, bought, threw, pulled, found
        """,
        "verb": """
            admire, borrow, choose, describe, enjoy, finish, gather, hear, ignore, judge, keep,
            loathe, measure, notice, offer, paint, question, refuse, shake, thank, understand,
            value, watch, yank, zip, buy, throw, pull, find
        """,
        "moved": """
            arrived, bounced, crashed, danced, exploded, floated, glowed, hid, jumped, knelt,
            lurched, marched, nodded, paused, quivered, rolled, shivered, thawed, vanished, waited,
            yawned, zigzagged, fell, stood
        """,
        "number": """
            two, three, four, five, six, seven, eight, nine, eleven, twelve, thirteen, fourteen
        """,
        "when": """
            this morning, on Thursday, last year, before lunch, after the show, at noon, in July,
            every evening, just now, once again, too early, by chance, with pleasure,
            without a fuss, for a change, very often
        """,
        "where": """
            near the church, under the bridge, by the fire, in the north, behind the house,
            over the river, at the zoo, on the beach, around the pool, beyond the village,
            through the fog, beside the road, outside the garage, in the bathroom,
            towards the south, across the yard
        """,
    }.items()
}


def draw_sentences(count: int, rng: random.Random) -> list[str]:
    """Draw `count` different sentences."""
    sentences: dict[str, None] = {}  # an ordered set
    while len(sentences) < count:
        template = rng.choice(_TEMPLATES)
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field]
        sentence = template.format(**{field: rng.choice(_WORDS[field]) for field in fields})
        sentences[sentence[0].upper() + sentence[1:]] = None
    return list(sentences)
