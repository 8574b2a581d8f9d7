"""Makes the JSONL files for both stages from Reddit posts with summaries (Stiennon et al. 2020, arXiv 2009.01325).

    python -m data.tldr.prepare                    downloads the official release first (some hundred MB)
    python -m data.tldr.prepare --source FOLDER    reads it from a folder: tldr_3_filtered/{train,valid,test}.jsonl with
                                                   the posts and their authors' summaries, and comparisons/*.json with
                                                   people's choices between two summaries
    python -m data.tldr.prepare --source FOLDER --cnndm test.csv      also makes prompts from news articles

The prompt is the release's query, at most 512 GPT-2 tokens long:

    SUBREDDIT: r/{subreddit}\\n\\nTITLE: {title}\\n\\nPOST: {post}\\n\\nTL;DR:

A post that is too long is cut at its last line break, again and again, until the query fits. If one line is left and
still does not fit, its last characters are cut. Each summary gets one space before it and none after it, because the
spaces in the release would tell a model who wrote the summary.

    sft_train, sft_valid, sft_test              {"prompt", "completion"}, from the three files of posts
    prompts_train, prompts_valid, prompts_test  {"prompt"}, the same prompts, each once
    pairs_train, pairs_valid, pairs_test        {"prompt", "chosen", "rejected"}: the comparisons marked train, valid1
                                                and valid2 (the release's authors evaluated on valid2)
    cnndm_test                                  {"prompt", "completion"}, an article and its highlights: prompts from
                                                another distribution (section 6.3 of the DPO paper)

A training row is left out if its prompt is in a valid or test file. All rows are ordered by a hash.
"""

import bisect
import csv
import dataclasses
import functools
from collections import Counter
from pathlib import Path

from data.download import download
from data.preparing import LeftOut, shuffled, usable, write_rows
from minidpo.files.jsonl import check_text, json_lines
from minidpo.settings import UserError, knob, parse_settings, run_main
from minidpo.tokenizer import Tokenizer

FOLDER = Path(__file__).parent
URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
BATCHES = [*(f"batch{i}" for i in range(3, 23) if i != 21), "edit_b2_eval_test"]  # the comparisons of posts
SPLITS = {"train": "train", "valid1": "valid", "valid2": "test"}  # the release's name: our name
TAIL = "\n\nTL;DR:"
SEED = "minidpo tldr 1"  # another string gives another order


@dataclasses.dataclass
class Settings:
    source: str = knob("", "a folder with tldr_3_filtered/ and comparisons/; empty: download them")
    cnndm: str = knob("", "CNN/DailyMail's test split: a .csv or .jsonl file, or a folder of .story files; empty: none")
    tokenizer: str = knob("gpt2", "the tokenizer that counts the tokens: gpt2, or a bpe.json file")
    max_query_tokens: int = knob(512, "length of the longest query, in tokens", least=32)
    out: str = knob(str(FOLDER), "folder for the JSONL files")


# ---- 1. The query and its length ----


def query_maker(tokenizer, limit, counts):
    """Returns the function query(head, text): `head`, as much of `text` as fits into `limit` tokens, and "TL;DR:".

    query raises LeftOut if there is no room for any text, and adds 1 to counts["cut"] for each text it cuts. Its
    results are cached, because most posts occur in many comparisons.
    """

    def fits(head, text):
        return len(tokenizer.encode(head + text + TAIL)) <= limit

    @functools.cache
    def query(head, text):
        kept = text
        while not fits(head, kept) and "\n" in kept:
            kept = kept[: kept.rindex("\n")]
        if not fits(head, kept):  # one line is left: find the longest part that fits by bisection
            too_long = bisect.bisect_left(range(len(kept) + 1), True, key=lambda n: not fits(head, kept[:n]))
            if too_long <= 1:
                raise LeftOut("no room for the text after its title")
            kept = kept[: too_long - 1]
        counts["cut"] += kept != text
        return head + kept + TAIL

    return query


def post_query(post, where, query):
    """Returns the query of {"subreddit", "title", "post"}; UserError if a field is missing or not a string."""
    need_texts(post, ("subreddit", "title", "post"), where)
    return query(f"SUBREDDIT: r/{post['subreddit']}\n\nTITLE: {post['title']}\n\nPOST: ", post["post"])


def need_texts(record, fields, where):
    """Raises UserError unless `record` is an object with these fields, all strings."""
    for field in fields:
        if not isinstance(record, dict) or field not in record:
            raise UserError(f"{where}: no field {field!r}. Needed are: {', '.join(fields)}.")
        check_text(record, field, where)


# ---- 2. One row ----


def to_sft(record, where, query):
    """Converts a line of tldr_3_filtered to {"prompt", "completion"}."""
    need_texts(record, ("summary",), where)
    if not record["summary"].strip():
        raise LeftOut("an empty summary")
    return {"prompt": post_query(record, where, query), "completion": " " + record["summary"].strip()}


def to_pair(record, where, query):
    """Converts a line of comparisons/ to (our name of its split, {"prompt", "chosen", "rejected"})."""
    info, summaries, choice = record["info"], record["summaries"], record["choice"]
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise UserError(f"{where}: 'info' must be an object and 'summaries' a list of two.")
    for summary in summaries:
        need_texts(summary, ("text",), where)
    if type(choice) is not int or choice not in (0, 1):
        raise UserError(f"{where}: 'choice' is {choice!r}; it must be 0 or 1, the index of the better summary.")
    if record["split"] not in list(SPLITS):  # in a list, so that a value that cannot be hashed is an error of ours
        raise UserError(f"{where}: 'split' is {record['split']!r}; it must be one of {', '.join(SPLITS)}.")
    if info.get("article") and not info.get("post"):
        raise LeftOut("an article, not a post")
    chosen, rejected = (" " + summaries[i]["text"].strip() for i in (choice, 1 - choice))
    if chosen == " " or rejected == " ":
        raise LeftOut("an empty summary")
    if chosen == rejected:
        raise LeftOut("two equal summaries")
    prompt = post_query(info, where, query)
    return SPLITS[record["split"]], {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def to_article(record, where, query):
    """Converts an article and its highlights to {"prompt", "completion"}; each highlight becomes one sentence."""
    need_texts(record, ("article", "highlights"), where)
    highlights = [line.strip() for line in record["highlights"].split("\n") if line.strip()]
    if not record["article"].strip() or not highlights:
        raise LeftOut("an empty article, or no highlights")
    summary = " ".join(line if line[-1] in ".!?'\"" else line + "." for line in highlights)
    return {"prompt": query("Article:\n\n", record["article"].strip()), "completion": " " + summary}


# ---- 3. Files ----


def find_release(source):
    """Finds the release's files in the folder `source`, or downloads them if it is empty.

    Returns:
        ({split: path} of the posts, list of the paths of the comparisons)
    """
    folder = Path(source) if source else FOLDER / "download"
    posts = {split: folder / "tldr_3_filtered" / f"{split}.jsonl" for split in SPLITS.values()}
    if not source:
        # no digest is known: a download is checked by its length, and each line when it is read
        for path in posts.values():
            download(f"{URL}/datasets/tldr_3_filtered/{path.name}", path, otherwise="pass --source FOLDER")
        for name in BATCHES:
            path = folder / "comparisons" / f"{name}.json"
            download(f"{URL}/dataset/comparisons/{path.name}", path, otherwise="pass --source FOLDER")
    comparisons = sorted((folder / "comparisons").glob("*.json"))
    for path in [*posts.values(), *(comparisons or [folder / "comparisons" / "batch3.json"])]:
        if not path.exists():
            raise UserError(f"{path} not found. --help lists the files that --source must hold.")
    return posts, comparisons


def read_cnndm(path):
    """Yields pairs (where, {"article", "highlights"}) from CNN/DailyMail in one of its published formats.

    A .csv or .jsonl file has these two fields. A folder holds .story files: the article, then each highlight below a
    line "@highlight".
    """
    path = Path(path)
    if path.is_dir():
        for file in sorted(path.rglob("*.story")):
            try:
                article, *highlights = file.read_text(encoding="utf-8").split("@highlight")
            except UnicodeDecodeError as error:
                raise UserError(f"{file}: not UTF-8 ({error}). Save the file as UTF-8.") from error
            yield file, {"article": article, "highlights": "\n".join(h.strip() for h in highlights)}
    elif path.suffix == ".csv":
        csv.field_size_limit(1 << 30)  # the default limit, 128 kB, is too short for some articles
        with open(path, encoding="utf-8", newline="") as file:
            lines = csv.DictReader(file, strict=True)
            try:
                for record in lines:
                    yield f"{path}, line {lines.line_num}", record
            except (UnicodeDecodeError, csv.Error) as error:
                where = f"{path}, after line {lines.line_num}"
                raise UserError(f"{where}: not CSV in UTF-8 ({error}). Download it again.") from error
    else:
        yield from json_lines(path, ("article", "highlights"))


def main(argv=None):
    settings = parse_settings(Settings, __doc__, argv)
    tokenizer = Tokenizer.gpt2() if settings.tokenizer == "gpt2" else Tokenizer.load(settings.tokenizer)
    counts = Counter()
    query = query_maker(tokenizer, settings.max_query_tokens, counts)
    posts, comparisons = find_release(settings.source)

    sft, pairs = {}, {split: [] for split in SPLITS.values()}
    for split, path in posts.items():
        sft[split] = usable(
            json_lines(path, ("subreddit", "title", "post", "summary")), functools.partial(to_sft, query=query), path
        )
    for path in comparisons:
        records = json_lines(path, ("info", "summaries", "choice", "split"))
        for split, pair in usable(records, functools.partial(to_pair, query=query), path):
            pairs[split].append(pair)
    print(f"{counts['cut']:,} different posts were cut to {settings.max_query_tokens} tokens")

    files = {}
    held_out = {row["prompt"] for split in ("valid", "test") for row in sft[split] + pairs[split]}
    for kind, parts in (("sft", sft), ("pairs", pairs)):
        train = [row for row in parts["train"] if row["prompt"] not in held_out]
        print(f"{kind}_train: {len(parts['train']) - len(train):,} rows left out (the same prompt is in valid or test)")
        for split, rows in {**parts, "train": train}.items():
            files[f"{kind}_{split}"] = shuffled(rows, SEED)
            if not rows:
                raise UserError(f"no row is left for {kind}_{split}, so nothing was written. Is the release complete?")
    for split in sft:
        prompts = dict.fromkeys(row["prompt"] for row in files[f"sft_{split}"])
        files[f"prompts_{split}"] = [{"prompt": prompt} for prompt in prompts]
    if settings.cnndm:
        records = read_cnndm(settings.cnndm)
        articles = usable(records, functools.partial(to_article, query=query), settings.cnndm)
        if not articles:
            raise UserError(f"{settings.cnndm}: no usable article. Give a .csv, a .jsonl or a folder of .story files.")
        files["cnndm_test"] = shuffled(articles, SEED)
    write_rows(settings.out, files)


if __name__ == "__main__":
    run_main(main)
