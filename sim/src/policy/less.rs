//! LESS: some tokens stay, by default heavy hitters and the newest, and what was dropped leaves a small state that attention
//! reads beside them.
//!
//! Every token that eviction drops is added to a state of constant size per KV head, through a small trained network of its
//! key; queries read it through another. So a budget of tokens keeps something of all the others, for the memory of
//! `rank` / 2 tokens of a 32-bit cache.
//!
//! Paper: <https://arxiv.org/abs/2402.09398>. Parameters: `over`, the kind of policy by which tokens stay (H2O), and its
//! parameters; `rank` (rows of the state) and `hidden` (width of the networks). `maps` is the file with the trained networks
//! (`batchmax prepare less`). It works over every policy that ranks tokens and keeps a budget of them; one that keeps as many
//! as the text asks for, or forwards fewer rows, or reads a part only, is refused. Deviations: the authors mask dropped tokens, here their memory is freed; with grouped queries there is one state and one key network per
//! KV head; networks are 64 wide instead of 512, which for small models would add a tenth to the weights.

use std::sync::Arc;

use serde::Deserialize;
use serde::de::Error;

use super::{
    Beside, Budget, Evictor, H2o, Leaves, Policy, PolicyError, Request, Role, Step, builder,
};
use crate::form::{Form, State};
use crate::kv::KvTape;
use crate::profile::Model;
use crate::units::{Layer, Tokens};

/// Eviction that leaves a state.
#[derive(Clone, Debug)]
pub struct Less {
    /// What stays.
    pub evicting: Arc<dyn Evictor>,
    /// The state.
    pub state: State,
    /// File of the trained networks.
    pub maps: Option<String>,
}

/// The kind of policy that it works over.
const USUAL: &str = "h2o";

/// The keys of a preset that are not the eviction's.
#[derive(Deserialize)]
#[serde(default)]
struct Own {
    over: String,
    rank: u32,
    hidden: u32,
    maps: Option<String>,
}

impl Default for Own {
    fn default() -> Self {
        Self { over: USUAL.to_owned(), rank: 8, hidden: 64, maps: None }
    }
}

impl Less {
    /// With its usual parameters and this budget.
    #[must_use]
    pub fn new(budget: Budget) -> Self {
        let Own { rank, hidden, maps, .. } = Own::default();
        Self { evicting: Arc::new(H2o::new(budget)), state: State { rank, hidden }, maps }
    }

    /// From the keys of a preset.
    ///
    /// # Errors
    /// If one is wrong, or the policy that it is to work over does more than rank tokens.
    pub fn from_table(mut table: toml::Table) -> Result<Self, toml::de::Error> {
        let mut own = toml::Table::new();
        for key in ["over", "rank", "hidden", "maps"] {
            if let Some(value) = table.remove(key) {
                own.insert(key.to_owned(), value);
            }
        }
        let Own { over, rank, hidden, maps } = toml::Value::Table(own).try_into()?;
        let evictor = |table: toml::Table| {
            let build = builder(&over).filter(|_| over != "less");
            build.map(|build| build(table)).transpose().map(|p| p.and_then(Policy::evictor))
        };
        // Whether it is one at all shows without its other parameters.
        let bare = toml::Table::from_iter([("budget".to_owned(), toml::Value::from(64))]);
        if !matches!(evictor(bare), Ok(Some(_))) {
            return Err(Error::custom(format!(
                "over: {over:.40} does not just rank tokens and keep a budget of them; hint: over=h2o, snapkv or tova"
            )));
        }
        let evicting = evictor(table)?.ok_or_else(|| Error::custom("over: no evicting policy"))?;
        Ok(Self { evicting, state: State { rank, hidden }, maps })
    }
}

impl Policy for Less {
    fn label(&self) -> String {
        let evicting = self.evicting.label();
        let (over, parameters) = evicting.split_once(':').unwrap_or(("", &evicting));
        let over = if over == USUAL { String::new() } else { format!("over={over},") };
        let maps = self.maps.as_ref().map_or_else(String::new, |m| format!(",maps={m}"));
        let State { rank, hidden } = self.state;
        format!("less:{over}rank={rank},hidden={hidden},{parameters}{maps}")
    }

    fn role(&self) -> Role {
        Role::Evicts
    }

    fn prefill_chunk(&self) -> Option<Tokens> {
        self.evicting.prefill_chunk()
    }

    fn acts_in_decode(&self) -> bool {
        self.evicting.acts_in_decode()
    }

    fn layer_kind(&self, layer: Layer, model: &Model) -> u32 {
        self.evicting.layer_kind(layer, model)
    }

    fn form(&self, _layer: Layer, _model: &Model) -> Form {
        Form { state: Some(self.state), ..Form::default() }
    }

    fn beside(&self) -> Beside {
        self.maps.clone().map_or(Beside::Missing, Beside::File)
    }

    fn leaves(&self, request: &Request<'_>) -> Option<Leaves> {
        self.evicting.leaves(request)
    }

    fn check(&self, request: &Request<'_>) -> Result<(), PolicyError> {
        let refuse = |problem: String, remedy: &str| {
            Err(PolicyError { policy: self.label(), problem, remedy: remedy.to_owned() })
        };
        let State { rank, hidden } = self.state;
        if !(1..=256).contains(&rank) || !(1..=4096).contains(&hidden) {
            return refuse(
                format!("rank={rank},hidden={hidden} are no widths of small networks"),
                "set rank to 1..256 (8 is usual), hidden to 1..4096 (64 is usual)",
            );
        }
        if self.evicting.form(0, request.model).rerotated {
            return refuse(
                "the state was made of keys as they came, and those that stay are turned"
                    .to_owned(),
                "leave out rerotate",
            );
        }
        if request.model.sliding_window.is_some() {
            return refuse(
                format!(
                    "{} has sliding layers, which drop what nobody asks for",
                    request.model.name
                ),
                "use an evicting policy",
            );
        }
        self.evicting.check(request)
    }

    fn after_attend(&self, step: &Step<'_>, kv: &mut KvTape<'_>) {
        // Before a first cut there are fewer tokens than the budget, and nothing to read.
        if kv.length().settled >= self.evicting.layer_budget(step).0 {
            kv.read_state();
        }
        self.evicting.after_attend(step, kv);
    }

    fn after_pass(&self, step: &Step<'_>, kv: &mut KvTape<'_>) {
        self.evicting.after_pass(step, kv);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::KvLayout;
    use crate::load::{Load, Schedule};
    use crate::lower::{Setup, lower};
    use crate::memory::{footprint, kv_peaks};
    use crate::op::{DType, OpKind, Phase};
    use crate::policy::{H2o, Preset};
    use crate::profile::Catalog;
    use crate::units::Bytes;

    fn setup() -> Setup {
        Setup {
            kv: KvLayout { dtype: DType::F16, block_tokens: 1, shares_prefix: false },
            weights: DType::F32,
            activations: DType::F32,
            head: DType::F32,
            tp: 1,
        }
    }

    #[test]
    fn a_state_costs_its_own_bytes_and_its_maps() {
        let model = Catalog::built_in().model("smollm2-135m").expect("built in");
        let load = Load::uniform(2, 512, 20, Schedule::Static);
        let budget = Budget::Tokens(128);
        let less = lower(&model, &Less::new(budget), &load, setup()).expect("lowers");
        let h2o = lower(&model, &H2o::new(budget), &load, setup()).expect("lowers");
        // Per layer and sequence 3 heads x (8 x 64 + 8) floats; all layers hold theirs in decode.
        let state = 3 * 520 * 4;
        let apart = |of: fn(&crate::memory::KvPeaks) -> Bytes| {
            of(&kv_peaks(&less)).0 - of(&kv_peaks(&h2o)).0
        };
        assert_eq!(apart(|p| p.decode), 2 * 30 * state);
        assert_eq!(apart(|p| p.prefill), 2 * 30 * state);
        // Per layer 9 x (64 x 64 + 64 x 8) of the queries, 3 x (64 x 64 + 64 x 8 + 8 x 8 + 2 x 8) of the keys: 55,536.
        let weights = |program| footprint(&model, program, Bytes(0)).weights.0;
        assert_eq!(weights(&less) - weights(&h2o), 30 * 55_536 * 4);
    }

    #[test]
    fn it_works_over_what_ranks_tokens_and_nothing_else() {
        let catalog = Catalog::built_in();
        let parse = |text: &str| Preset::parse(&catalog, text);
        let snap = parse("less:over=snapkv,window=16,budget=512").expect("ranks");
        let label = snap.policy.label();
        assert!(label.starts_with("less:over=snapkv,rank=8,hidden=64,window=16,"), "{label}");
        assert!(!snap.policy.acts_in_decode(), "it cuts when SnapKV does");
        let again = parse(&label).expect("labels are accepted").policy;
        assert_eq!(again.label(), label);
        for kind in ["tova", "streaming-llm", "knorm", "adakv", "pyramidkv", "batch-max", "h2o"] {
            parse(&format!("less:over={kind}")).expect(kind);
        }
        for kind in ["full", "kivi", "rocketkv", "fastkv", "dbudgetkv", "quest", "less", "no"] {
            let error = parse(&format!("less:over={kind}")).expect_err(kind).to_string();
            assert!(error.contains(kind) && error.contains("hint: "), "{error}");
        }
        let error = parse("less:over=snapkv,heavy=0.5").expect_err("H2O's").to_string();
        assert!(error.contains("heavy"), "{error}");
        for (text, goes) in [("less+kivi", true), ("snapkv+less", false), ("less+quest", false)] {
            assert_eq!(parse(text).is_ok(), goes, "{text}");
        }
    }

    #[test]
    fn dropped_tokens_are_added_and_later_steps_read_them() {
        let model = Catalog::built_in().model("smollm2-135m").expect("built in");
        let load = Load::uniform(1, 512, 2, Schedule::Static);
        let ops = |policy: &Less| {
            let program = lower(&model, policy, &load, setup()).expect("lowers");
            let mut found = Vec::new();
            program.visit_passes(|_, pass, _| {
                for op in &pass.layers[0].ops {
                    if matches!(op.kind, OpKind::Accumulate { .. } | OpKind::ReadState { .. }) {
                        found.push((pass.phase, op.name, op.work(0)));
                    }
                }
            });
            found
        };
        let found = ops(&Less::new(Budget::Tokens(128)));
        let names: Vec<_> = found.iter().map(|(phase, name, _)| (*phase, *name)).collect();
        assert_eq!(
            names,
            [
                (Phase::Prefill, "accumulate"),
                (Phase::Decode, "read_state"),
                (Phase::Decode, "accumulate")
            ]
        );
        // 384 tokens of 3 heads: networks of 64 x 64 + 64 x 8 + 8 x 8, and 8 x 65 sums.
        assert_eq!(found[0].2.flops.0, 384.0 * 3.0 * 2.0 * (4672.0 + 520.0));
        // One row of 9 heads: networks of 64 x 64 + 64 x 8, and 8 x 65 products.
        assert_eq!(found[1].2.flops.0, 9.0 * 2.0 * (4608.0 + 520.0));
        // With room for everything there is nothing to do.
        assert_eq!(ops(&Less::new(Budget::Tokens(600))), []);
    }
}
