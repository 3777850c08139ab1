//! Examples, which stand first in the help of each command.

use clap::Command;

/// The help of a command: what it is, examples, usage, flags.
const TEMPLATE: &str =
    "{about-with-newline}\n{before-help}{usage-heading} {usage}\n\n{all-args}{after-help}";

/// Examples by command; a command below another is named with a blank between.
const EXAMPLES: &[(&str, &[&str])] = &[
    (
        "plan",
        &[
            "batchmax plan --model llama-3.1-8b --gpu h100-sxm --isl 32k --osl 512",
            "batchmax plan --model llama-3.1-70b --gpu h100-sxm,h200-sxm --gpus 8 --objective cost --tpot 50ms",
            "batchmax plan --model qwen2.5-7b --gpu l40s --isl 16k --html plan.html",
        ],
    ),
    (
        "tui",
        &["batchmax tui", "batchmax tui --model llama-3.1-8b --gpu h100-sxm --isl 32k --osl 512"],
    ),
    (
        "what-if",
        &[
            "batchmax what-if --model qwen2.5-7b --gpu l40s --isl 2k..32k --batch 1,2,4",
            "batchmax what-if --model llama-3.1-8b --gpu h100-sxm --policy full batch-max --isl 8k --csv",
            "batchmax what-if --scenarios scenarios.csv",
        ],
    ),
    (
        "explain",
        &[
            "batchmax explain --model llama-3.1-8b --gpu h100-sxm --policy batch-max --isl 2k --batch 4",
        ],
    ),
    ("devices", &["batchmax devices", "batchmax devices --json"]),
    ("fetch", &["batchmax fetch", "batchmax fetch my-model.gguf --name mine"]),
    ("import", &["batchmax import vllm-log serve.log --gpu h100"]),
    (
        "import aiconfigurator",
        &["batchmax import aiconfigurator aiconfigurator_core-0.12.0.whl --gpu h100"],
    ),
    (
        "import aiconfigurator-runs",
        &["batchmax import aiconfigurator-runs aiconfigurator_core-0.12.0.whl"],
    ),
    (
        "import vidur",
        &["batchmax import vidur mlp.csv attention.csv --gpu a100 --model llama-3-8b"],
    ),
    ("import vllm-log", &["batchmax import vllm-log serve.log --gpu h100"]),
    (
        "import vllm-bench",
        &["batchmax import vllm-bench result.json --gpu h100 --tp 2 --weight-dtype bf16"],
    ),
    ("import batchmax-profile", &["batchmax import batchmax-profile profile.json"]),
    ("import batchmax-validate", &["batchmax import batchmax-validate result.json --gpu h100-sxm"]),
    ("profile", &["batchmax profile", "batchmax profile --threads 2 --weight-dtype f32"]),
    ("calibrate", &["batchmax calibrate", "batchmax calibrate --points gemm.csv attn_decode.csv"]),
    ("calibrate check", &["batchmax calibrate check --points gemm.csv --hold-out keys"]),
    ("calibrate engines", &["batchmax calibrate engines --runs runs.csv --tiers tiers.csv"]),
    ("score", &["batchmax score --runs runs.csv --tiers tiers.csv --html score.html"]),
    (
        "run",
        &[
            "batchmax run --prompt 'What is the capital of France?' --chat",
            "batchmax run --policy batch-max --isl 2k --osl 256 --batch 4",
        ],
    ),
    (
        "validate",
        &[
            "batchmax validate --policy batch-max --batch 4",
            "batchmax validate --policy snapkv --isl 1k --osl 64 --html run.html",
        ],
    ),
    ("compare", &["batchmax compare", "batchmax compare --kv-memory 128MB"]),
    (
        "quality",
        &[
            "batchmax quality --policy snapkv batch-max --context 512",
            "batchmax quality --chunked --out quality.json",
        ],
    ),
    (
        "prepare",
        &[
            "batchmax prepare duoattention --out heads.toml",
            "batchmax prepare less --out less.toml",
        ],
    ),
    ("models", &["batchmax models", "batchmax models llama-3.1-8b"]),
    ("gpus", &["batchmax gpus", "batchmax gpus h100-sxm --json"]),
    ("engines", &["batchmax engines", "batchmax engines vllm"]),
    ("policies", &["batchmax policies", "batchmax policies batch-max"]),
    ("doctor", &["batchmax doctor", "batchmax doctor --json"]),
    (
        "config",
        &["batchmax config", "batchmax config --config my.toml", "batchmax config --isl 4k --json"],
    ),
    (
        "completions",
        &[
            "batchmax completions bash > ~/.local/share/bash-completion/completions/batchmax",
            "batchmax completions fish > ~/.config/fish/completions/batchmax.fish",
        ],
    ),
    ("man", &["batchmax man --out ~/.local/share/man/man1"]),
];

/// Puts the examples first in every help.
pub fn first(command: Command) -> Command {
    below(command, "")
}

fn below(mut command: Command, path: &str) -> Command {
    let names: Vec<String> = command.get_subcommands().map(|c| c.get_name().to_owned()).collect();
    for name in names {
        let own = if path.is_empty() { name.clone() } else { format!("{path} {name}") };
        command = command.mut_subcommand(&name, |c| below(c, &own));
    }
    match EXAMPLES.iter().find(|(name, _)| *name == path) {
        Some((_, lines)) => {
            let text = format!("Examples:\n  {}", lines.join("\n  "));
            command.help_template(TEMPLATE).before_help(text)
        }
        None => command,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::CommandFactory;

    /// Words of a line; quotes hold words together.
    fn words(line: &str) -> Vec<String> {
        let mut words = Vec::new();
        for (i, part) in line.split('\'').enumerate() {
            match i % 2 {
                0 => words.extend(part.split_whitespace().map(str::to_owned)),
                _ => words.push(part.to_owned()),
            }
        }
        words
    }

    #[test]
    fn every_command_has_examples_and_they_are_accepted() {
        fn missing(command: &Command, path: &str) -> Vec<String> {
            let known = |own: &str| EXAMPLES.iter().any(|(name, _)| *name == own);
            let mut without = Vec::new();
            for sub in command.get_subcommands() {
                let own = format!("{path} {}", sub.get_name()).trim().to_owned();
                without.extend(missing(sub, &own));
                without.extend(Some(own).filter(|own| !known(own)));
            }
            without
        }
        assert_eq!(missing(&Cli::command(), ""), Vec::<String>::new());
        for (name, lines) in EXAMPLES {
            let first = name.split(' ').next().unwrap_or_default();
            // Some commands are not in every build.
            if Cli::command().find_subcommand(first).is_none() {
                continue;
            }
            for line in *lines {
                let line = line.split(" > ").next().unwrap_or_default();
                assert!(line.starts_with(&format!("batchmax {name}")), "{line}");
                if let Err(error) = Cli::command().try_get_matches_from(words(line)) {
                    panic!("{line}: {error}");
                }
            }
        }
    }

    #[test]
    fn help_leads_with_examples() {
        let mut command = first(Cli::command());
        let plan = command.find_subcommand_mut("plan").expect("plan");
        let help = plan.render_long_help().to_string();
        let (examples, usage) = (help.find("Examples:"), help.find("Usage:"));
        assert!(examples.is_some() && examples < usage, "{help}");
    }
}
