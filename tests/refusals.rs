//! What a policy can't do, said before any work starts: one line with the reason, one with the way out, exit code 2.

mod common;

use common::{Place, TINY, refuses};

const HERE: &str = "--gpu h100-sxm --isl 1k --osl 16";

#[test]
fn parameters_that_can_not_be() {
    for (policy, parts) in [
        ("snapkv:budget=20", ["a budget of 20 tokens can't hold 0 sinks and 32", "at least 32"]),
        ("streaming-llm:budget=3", ["can't hold 4 sinks and 1 recent tokens", "at least 5"]),
        (
            "snapkv:window=2k,budget=3k",
            ["a window of 2048 queries is longer than the prompt", "--isl"],
        ),
        ("fastkv:window=2k", ["a window of 2048 in a prompt of 1024", "set window between 1"]),
        ("rocketkv:budget=2", ["which can't hold the window", "raise budget"]),
        ("kivi:group=16", ["groups of 16 are no multiple of 32", "use 32, 64"]),
        ("kivi:group=48", ["groups of 48 don't divide the 64 channels", "a divisor of the head"]),
        ("kivi:bits=3", ["3 bits can't be packed", "8, 4, 2 or 1"]),
        ("duoattention:recent=0", ["has to see its newest token", "recent to 1"]),
        ("adakv:rerotate=true", ["no common place for the next token", "leave out rerotate"]),
        ("expected-attention:rerotate=true", ["at places in the text", "leave out rerotate"]),
        ("less:rerotate=true", ["keys as they came, and those that stay are turned", "rerotate"]),
        ("snapkv:rerotate=true+kivi", ["have no second owner", "leave out rerotate"]),
    ] {
        refuses(&format!("what-if --model smollm2-135m {HERE} --policy {policy}"), &parts);
    }
}

#[test]
fn policies_that_contradict_each_other() {
    for (policy, parts) in [
        ("snapkv+h2o", ["two policies evict from one cache", "name one"]),
        ("refreshkv+h2o", ["relies on the tokens that the other drops", "name one"]),
        ("kivi+snapkv", ["packed tokens would be taken apart again", "snapkv+think+kivi"]),
        ("cacheblend+h2o", ["by the queries of the whole prompt", "cacheblend+snapkv"]),
        ("cacheblend+batch-max", ["put together at once", "chunk=0"]),
        ("cacheblend+less", ["a prompt that is read whole", "leave one"]),
        ("cacheblend+fastkv", ["two policies choose the rows", "leave one"]),
        ("cacheblend+snapkv:window=80", ["a window of 80 queries", "raise suffix"]),
        ("cacheblend+kvsharer", ["stored of every layer", "leave one"]),
        ("snapkv+cacheblend", ["before anything else is done to it", "cacheblend+kivi"]),
        ("kvsharer+quest", ["a shared cache has several", "evicting or packing"]),
        (
            "kvsharer+rocketkv",
            ["by a layer's own cache, and some have none", "evicting or packing"],
        ),
        ("kvsharer+fastkv", ["by a layer's own cache, and some have none", "evicting or packing"]),
        ("rocketkv+kivi", ["are copied as they came", "name one"]),
        ("rocketkv+think", ["are copied as they came", "name one"]),
        ("fastkv+kivi", ["a budget of 102 tokens is less than the 128 newest", "lower residual"]),
        ("batch-max+think", ["channels are dropped once", "evict once"]),
        ("full+kivi", ["keeps everything", "leave it out"]),
    ] {
        refuses(&format!("what-if --model smollm2-135m {HERE} --policy {policy}"), &parts);
    }
}

#[test]
fn models_with_sliding_layers() {
    for policy in [
        "quest",
        "clusterkv",
        "rocketkv",
        "refreshkv",
        "fastkv",
        "kvsharer",
        "less",
        "cacheblend",
        "specache",
    ] {
        let args = format!("what-if --model gemma-2-9b {HERE} --policy {policy}");
        refuses(&args, &["gemma-2-9b has sliding layers", "hint: use"]);
    }
}

#[test]
fn a_model_with_one_kv_head_has_nothing_to_share() {
    let place = Place::new();
    let model = TINY
        .replace("\"tiny\"", "\"one\"")
        .replace("kv_heads = 2", "kv_heads = 1")
        .replace("= 512", "= 4096");
    place.write("one.toml", model);
    let args = format!("what-if --model one.toml {HERE} --policy adakv");
    let err = place.run(&args.split(' ').collect::<Vec<_>>()).refused();
    assert!(err.contains("one has one KV head: there is nothing to share"), "{err}");
}

#[test]
fn what_was_prepared_for_another_model() {
    let place = Place::new();
    for (text, parts) in [
        (
            "kind = \"kvsharer\"\nabout = \"x\"\nlayers = 1\n[maps]\nllama-7b = [[3, 1]]\n",
            ["its map is one of llama-7b, not of smollm2-135m", "batchmax prepare kvsharer"],
        ),
        (
            "kind = \"duoattention\"\nabout = \"x\"\n[streaming]\nllama-7b = [[3, 1]]\n",
            ["llama-7b, not of smollm2-135m", "batchmax prepare duoattention"],
        ),
    ] {
        place.write("found.toml", text);
        let args = format!("what-if --model smollm2-135m {HERE} --policy found.toml");
        let err = place.run(&args.split(' ').collect::<Vec<_>>()).refused();
        assert!(parts.iter().all(|part| err.contains(part)), "{err}");
    }
}
