"""What the speculation benchmark asks: code, prose, and edits that mostly copy their prompt.

Three kinds of text that draft differently: code is regular, prose is not, and the answer to an edit
is in the prompt already, where n-gram lookup finds it.
"""

from typing import Final, Literal

from shared.protocol import ChatInput, Message

__all__ = ("CORPORA", "Corpus", "chat", "prompts")

Corpus = Literal["code", "prose", "edit", "repeat"]

CORPORA: Final[tuple[Corpus, ...]] = ("code", "prose", "edit", "repeat")

_CODE: Final = (
    "Write a Python function that merges two sorted lists into one sorted list.",
    "Write a Python class for a bank account with deposit, withdraw and a balance property.",
    "Write a JavaScript function that counts how often each word occurs in a string.",
    "Write a C function that reverses a singly linked list in place.",
    "Write a Python function that checks whether a string is a palindrome, with a docstring.",
    "Write SQL that creates tables for authors and books, and a query for each author's books.",
    "Write a Java class for a queue of integers on top of an array that grows.",
    "Write a Python function that reads a CSV file and returns a list of dictionaries.",
    "Write a Rust function that returns the largest element of a slice of integers.",
    "Write a Python script that renames all files of a folder to lower case.",
    "Write an HTML page with a form for name, e-mail address and a message.",
    "Write unit tests in Python for a function add(a, b) that adds two numbers.",
)

_PROSE: Final = (
    "Tell me about a fisherman who keeps a diary of the weather.",
    "Explain to a child why the sea is salty.",
    "Describe a market on a rainy morning.",
    "Write a letter from a grandmother to her grandson who has moved to a large city.",
    "What made the invention of the printing press important?",
    "Describe how bread is baked in a small village bakery.",
    "Tell a short story about two neighbours who share an apple tree.",
    "Explain what a budget is and why a family may want one.",
    "Write a short speech for the opening of a public library.",
    "Describe the life of a bee from the egg to its last flight.",
    "What should somebody know before a first walk in high mountains?",
    "Tell a short story about a clock that runs backwards.",
)

_COPY: Final = "Repeat the following text word for word, and write nothing else.\n\n"
_CODE_COPY: Final = "Repeat the following code exactly as it is, without any explanation.\n\n"

_EDIT: Final = (
    _COPY
    + """The harbour of Lindholm lies behind two long walls of grey stone. In the morning the
boats come back with herring and cod, and the gulls follow them to the quay. A small train
carries the boxes to the market hall, where the fishmongers have been waiting since five. By
noon the hall is empty and washed. In the afternoon the nets are mended on the grass beside the
old lighthouse, and children learn the knots from their grandparents. When the lamp of the
lighthouse is lit, the last boat has to be inside the walls.""",
    "Repeat all of the following code, but call the variable total by the name result.\n\n"
    + """```python
import sys

total = 0
count = 0
largest = None

for line in sys.stdin:
    line = line.strip()
    if not line:
        continue
    value = float(line)
    total = total + value
    count = count + 1
    if largest is None or value > largest:
        largest = value

if count == 0:
    print("no values")
    sys.exit(1)

print("values:", count)
print("total:", total)
print("average:", total / count)
print("largest:", largest)
```""",
    _COPY
    + """The garden club meets on the first Tuesday of every month at seven in the evening. In
March we will speak about the pruning of apple trees, in April about early potatoes, and in May
about the right time to plant tomatoes outside. Please bring gloves to the meeting in March,
since we will go to the orchard behind the school. Seeds can be exchanged at every meeting. The
fee for the year is twelve euros and can be paid to Mr. Brandt before the end of April. New
members are welcome at any time.""",
    _CODE_COPY
    + """```javascript
class Stack {
  constructor() {
    this.items = [];
  }

  push(item) {
    this.items.push(item);
    return this.items.length;
  }

  pop() {
    if (this.items.length === 0) {
      return undefined;
    }
    return this.items.pop();
  }

  peek() {
    if (this.items.length === 0) {
      return undefined;
    }
    return this.items[this.items.length - 1];
  }

  isEmpty() {
    return this.items.length === 0;
  }
}
```""",
    "Repeat the following text, but write Clara wherever it says Anna.\n\n"
    + """Anna lives in the last house of the village, next to the mill. Every morning Anna walks
along the river to the school, where she teaches the youngest children to read. At noon Anna
eats her bread under the chestnut tree. In the afternoon she repairs old books for the library
of the town, and many people bring her theirs. On Sundays Anna visits her brother, who builds
boats on the other side of the lake. In winter, when the lake is frozen, Anna walks across the
ice to him and stays until the evening.""",
    _CODE_COPY
    + """```json
{
  "name": "weather-station",
  "interval_seconds": 60,
  "sensors": [
    {"id": "temperature-1", "kind": "temperature", "unit": "celsius", "place": "roof"},
    {"id": "temperature-2", "kind": "temperature", "unit": "celsius", "place": "cellar"},
    {"id": "humidity-1", "kind": "humidity", "unit": "percent", "place": "roof"},
    {"id": "pressure-1", "kind": "pressure", "unit": "hectopascal", "place": "roof"},
    {"id": "wind-1", "kind": "wind", "unit": "metres per second", "place": "mast"}
  ],
  "storage": {"kind": "file", "path": "readings.csv", "keep_days": 365}
}
```""",
    _COPY
    + """To make the soup, wash one kilogram of carrots and cut them into slices. Peel two
onions and a piece of ginger and chop them. Heat two spoons of oil in a large pot and fry the
onions until they are soft. Add the ginger and the carrots and fry them for five minutes. Pour
in one litre of water, add a spoon of salt and let it boil for twenty minutes. Take the pot off
the stove, make a fine cream of the soup and stir in the juice of one orange. Serve it with
bread and a little parsley.""",
    "Repeat the following code, but rename the function load to read_all.\n\n"
    + """```python
import json
from pathlib import Path


def load(folder):
    records = []
    for path in sorted(Path(folder).glob("*.json")):
        with path.open() as file:
            record = json.load(file)
        record["source"] = path.name
        records.append(record)
    return records


def main():
    records = load("data")
    print(len(records), "records")
    for record in records:
        print(record["source"], record["title"])


if __name__ == "__main__":
    main()
```""",
    _COPY
    + """The second meeting of the council began at six. The mayor reported that the bridge over
the Aller will be closed from the third of June until the end of August. Buses will go by the
northern road and need fifteen minutes more. Mrs. Okafor asked whether bicycles can still cross.
The mayor answered that a narrow path for bicycles and walkers will stay open during the whole
time. Mr. Lund asked for a sign at the station. The council agreed, with nine votes for it and
one against. The meeting ended at a quarter past eight.""",
    _CODE_COPY
    + """```sql
CREATE TABLE customers (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    city TEXT NOT NULL
);

CREATE TABLE orders (
    id INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL REFERENCES customers (id),
    ordered_on DATE NOT NULL,
    amount INTEGER NOT NULL
);

SELECT customers.name, customers.city, SUM(orders.amount) AS total
FROM customers
JOIN orders ON orders.customer_id = customers.id
WHERE orders.ordered_on >= '2024-01-01'
GROUP BY customers.name, customers.city
ORDER BY total DESC;
```""",
    "Repeat the following list, but write Monday wherever it says Friday.\n\n"
    + """1. The windows of the ground floor are cleaned every Friday before noon.
2. The plants in the hall are watered every Friday and every Wednesday.
3. The paper bins are emptied every Friday after the last class.
4. The coffee machine is washed every Friday by whoever leaves last.
5. The key of the cellar is returned to the office every Friday at five.
6. The meeting room can be booked until Friday for the week that follows.
7. The lights of the parking place are checked every Friday evening.
8. The list of guests is sent to the front desk every Friday morning.""",
    _COPY
    + """The night train to the coast leaves platform four at ten past nine. It has eight
carriages, of which the first three stay in Norden and the last five go on to the island ferry.
Passengers with bicycles are asked to use the carriage behind the engine. Breakfast is served
from half past five in the carriage in the middle of the train. Whoever wants to be woken can
write the name of the station on the card at the door. The ferry waits for the train, even when
it is late, and reaches the island at eight.""",
)

_TEXTS: Final[dict[Corpus, tuple[str, ...]]] = {
    "code": _CODE,
    "prose": _PROSE,
    "edit": _EDIT,
    "repeat": tuple(text for pair in zip(_CODE[:6], _PROSE[:6], strict=True) for text in pair),
}


def chat(text: str) -> ChatInput:
    """Return a conversation of one question; the model's template adds its own system prompt."""
    return ChatInput((Message("user", text),))


def prompts(corpus: Corpus, count: int) -> list[ChatInput]:
    """Return the first `count` conversations of a corpus, from its start again where it ends."""
    texts = _TEXTS[corpus]
    return [chat(texts[index % len(texts)]) for index in range(count)]
