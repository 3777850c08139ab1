//! The inputs: a table of parameters, their texts, and how arrow keys change them. A form is a command line of `plan`.

use batchmax_sim::units::{parse_bytes, parse_seconds, parse_tokens};

use crate::cli::PlanArgs;

/// Where the neighbours of a value come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ladder {
    /// Model descriptions.
    Models,
    /// Devices, several separated by commas.
    Gpus,
    /// Policies, several separated by spaces.
    Policies,
    /// Engines.
    Engines,
    /// Values in order; what is typed may lie between them.
    Steps(&'static [&'static str]),
    /// Token counts or batches in order: fine steps go between them.
    Counts(&'static [&'static str]),
}

/// One parameter.
#[derive(Debug)]
pub struct Field {
    /// The flag without its dashes.
    pub flag: &'static str,
    /// What stands before the value.
    pub label: &'static str,
    /// The value where none is typed, as `plan` has it.
    pub usual: &'static str,
    /// How an empty value reads.
    pub empty: &'static str,
    /// Its neighbours.
    pub ladder: Ladder,
}

const TOKENS: &[&str] = &[
    "128", "256", "512", "1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k", "256k", "512k", "1M",
];
const SIZES: &[&str] = &[
    "", "32MB", "64MB", "128MB", "256MB", "512MB", "1GB", "2GB", "4GB", "8GB", "12GB", "16GB",
    "24GB", "32GB", "40GB", "48GB", "64GB", "80GB", "96GB", "128GB", "192GB", "256GB", "512GB",
];
const BATCHES: &[&str] =
    &["max", "1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1024"];
const BUDGETS: &[&str] = &["", "10%", "20%", "25%", "50%", "75%", "256", "512", "1k", "2k", "4k"];
const CHUNKS: &[&str] = &["", "128", "256", "512", "1k", "2k", "4k", "8k"];
const DEVICES: &[&str] = &["", "1", "2", "4", "8", "16", "32"];
const LATENCIES: &[&str] = &[
    "", "5ms", "10ms", "20ms", "30ms", "50ms", "100ms", "200ms", "500ms", "1s", "2s", "5s", "10s",
    "30s", "60s",
];

macro_rules! fields {
    ($($flag:literal, $label:literal, $usual:literal, $empty:literal, $ladder:expr;)*) => {
        /// All parameters, in the order of the form.
        pub const FIELDS: &[Field] = &[$(Field {
            flag: $flag, label: $label, usual: $usual, empty: $empty, ladder: $ladder,
        }),*];
    };
}

fields! {
    "model", "model", "smollm2-135m", "", Ladder::Models;
    "gpu", "gpu", "cpu", "", Ladder::Gpus;
    "policy", "policies", "", "all", Ladder::Policies;
    "isl", "prompt", "2k", "", Ladder::Counts(TOKENS);
    "osl", "output", "256", "", Ladder::Counts(TOKENS);
    "batch", "batch", "max", "", Ladder::Counts(BATCHES);
    "budget", "budget", "", "preset's", Ladder::Steps(BUDGETS);
    "chunk", "chunk", "", "searched", Ladder::Steps(CHUNKS);
    "memory", "memory", "", "engine's share", Ladder::Steps(SIZES);
    "kv-memory", "caches", "", "what is left", Ladder::Steps(SIZES);
    "weight-dtype", "weights", "", "model's own",
        Ladder::Steps(&["", "f32", "bf16", "fp8", "q8", "q4"]);
    "kv-dtype", "kv type", "", "16 bits", Ladder::Steps(&["", "f32", "f16", "bf16", "fp8"]);
    "engine", "engine", "", "what can run", Ladder::Engines;
    "schedule", "schedule", "", "both", Ladder::Steps(&["", "static", "staggered", "continuous"]);
    "gpus", "gpus", "", "one", Ladder::Steps(DEVICES);
    "tp", "tp", "", "searched", Ladder::Steps(DEVICES);
    "prefix-hit", "prefix hit", "0", "", Ladder::Steps(&["0", "25%", "50%", "75%", "90%"]);
    "osl-spread", "spread", "0", "", Ladder::Steps(&["0", "0.25", "0.5", "0.75", "1"]);
    "ttft", "ttft, most", "", "any", Ladder::Steps(LATENCIES);
    "tpot", "tpot, most", "", "any", Ladder::Steps(LATENCIES);
    "max-kl", "KL, most", "", "any",
        Ladder::Steps(&["", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5"]);
    "objective", "objective", "output", "", Ladder::Steps(&["output", "per-gpu", "cost"]);
    "threads", "threads", "", "all cores", Ladder::Steps(&["", "1", "2", "4", "8", "16", "32"]);
}

/// Index of a parameter by its flag.
pub fn index(flag: &str) -> usize {
    FIELDS.iter().position(|f| f.flag == flag).unwrap_or_default()
}

/// The texts of all parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Values(Vec<String>);

impl Values {
    /// What the flags of `plan` say.
    pub fn of(args: &PlanArgs) -> Self {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let number = |value: Option<String>| value.unwrap_or_default();
        let value = |field: &Field| match field.flag {
            "model" => args.model.clone(),
            "gpu" => args.gpu.clone(),
            "policy" => args.policy.join(" "),
            "isl" => args.isl.clone(),
            "osl" => args.osl.clone(),
            "batch" => args.batch.clone(),
            "budget" => text(&args.budget),
            "chunk" => text(&args.chunk),
            "memory" => text(&args.memory.memory),
            "kv-memory" => text(&args.memory.kv_memory),
            "weight-dtype" => text(&args.memory.weight_dtype),
            "kv-dtype" => text(&args.memory.kv_dtype),
            "engine" => text(&args.placement.engine),
            "schedule" => args.schedule.join(" "),
            "gpus" => number(args.gpus.map(|n| n.to_string())),
            "tp" => text(&args.placement.tp),
            "prefix-hit" => args.prefix_hit.clone(),
            "osl-spread" => args.osl_spread.clone(),
            "ttft" => text(&args.ttft),
            "tpot" => text(&args.tpot),
            "max-kl" => number(args.max_kl.map(|x| x.to_string())),
            "objective" => args.objective.clone(),
            "threads" => number(args.memory.threads.map(|n| n.to_string())),
            _ => String::new(),
        };
        Self(FIELDS.iter().map(value).collect())
    }

    /// One text.
    pub fn get(&self, field: usize) -> &str {
        &self.0[field]
    }

    /// One text, by its flag.
    pub fn of_flag(&self, flag: &str) -> &str {
        self.get(index(flag))
    }

    /// Changes one; an empty text where a value must stand is the usual one.
    pub fn set(&mut self, field: usize, text: &str) {
        let text = text.trim();
        let usual = FIELDS[field].usual;
        self.0[field] = if text.is_empty() { usual.to_owned() } else { text.to_owned() };
    }

    /// The arguments of `plan`, behind its name; what is as usual is left out.
    pub fn arguments(&self) -> Vec<String> {
        self.arguments_but(&[])
    }

    /// The same without some flags.
    pub fn arguments_but(&self, without: &[&str]) -> Vec<String> {
        let mut list = Vec::new();
        for (field, value) in FIELDS.iter().zip(&self.0) {
            if value == field.usual || value.is_empty() || without.contains(&field.flag) {
                continue;
            }
            let several = matches!(field.flag, "policy" | "schedule");
            list.push(format!("--{}", field.flag));
            if several {
                list.extend(value.split_whitespace().map(str::to_owned));
            } else {
                list.push(value.clone());
            }
        }
        list
    }
}

/// The value beside `text` on a ladder; what is not on it goes to the nearest one on that side.
pub fn neighbour(ladder: &[&str], text: &str, up: bool) -> Option<String> {
    let at = |i: usize| ladder.get(i).map(|s| (*s).to_owned());
    if let Some(i) = ladder.iter().position(|s| *s == text) {
        return if up { at(i + 1) } else { at(i.checked_sub(1)?) };
    }
    let Some(value) = magnitude(text) else { return at(0) };
    let mut sized = ladder.iter().filter_map(|s| Some((magnitude(s)?, *s)));
    let found = if up { sized.find(|(m, _)| *m > value) } else { sized.rfind(|(m, _)| *m < value) };
    found.map(|(_, s)| s.to_owned())
}

/// The next multiple of an eighth of the power of two below.
pub fn fine(text: &str, up: bool) -> Option<String> {
    let value = parse_tokens(text).ok()?;
    let step = |v: u32| ((1u32 << v.max(1).ilog2()) / 8).max(1);
    let next = if up {
        (value / step(value)).checked_add(1)?.checked_mul(step(value))?
    } else {
        let below = value.checked_sub(1).filter(|v| *v > 0)?;
        below / step(below) * step(below)
    };
    Some(if next % 1024 == 0 { format!("{}k", next / 1024) } else { next.to_string() })
}

/// How large a text is, in whatever it counts.
fn magnitude(text: &str) -> Option<f64> {
    if let Some(percent) = text.strip_suffix('%') {
        // Shares stand below counts.
        return percent.parse::<f64>().ok().map(|p| p / 100.0);
    }
    if let Ok(number) = text.parse::<f64>() {
        return number.is_finite().then_some(number);
    }
    if text.ends_with('s') {
        return parse_seconds(text).ok().map(|s| s.0);
    }
    let tokens = parse_tokens(text).ok().map(f64::from);
    tokens.or_else(|| parse_bytes(text).ok().map(|b| b.0 as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_on_a_ladder() {
        let step = |text: &str, up| neighbour(TOKENS, text, up).unwrap_or_default();
        assert_eq!((step("2k", true), step("2k", false)), ("4k".into(), "1k".into()));
        assert_eq!((step("3000", true), step("3000", false)), ("4k".into(), "2k".into()));
        assert_eq!((step("128", false), step("1M", true)), (String::new(), String::new()));
        assert_eq!(neighbour(SIZES, "20GB", true).as_deref(), Some("24GB"));
        assert_eq!(neighbour(LATENCIES, "25ms", false).as_deref(), Some("20ms"));
        assert_eq!(neighbour(BUDGETS, "30%", true).as_deref(), Some("50%"));
    }

    #[test]
    fn fine_steps_come_back() {
        assert_eq!(fine("2000", true).as_deref(), Some("2k"));
        for text in ["1k", "1920", "3", "1", "32k", "36k"] {
            let there = fine(text, true).expect("larger");
            let back = fine(&there, false).expect("smaller");
            assert_eq!(parse_tokens(&back), parse_tokens(text), "{text} {there} {back}");
        }
        assert_eq!(fine("1", false), None);
        assert_eq!(fine("max", true), None);
    }
}
