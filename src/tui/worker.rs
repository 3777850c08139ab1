//! The thread that computes. It holds one request, the newest; what a newer one makes stale is left.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex};

use anyhow::{Result, anyhow};
use clap::Parser;

use super::answer::{Advised, Found, Measured, Ops, ops};
use super::map::{Axes, Column, column};
use super::run::Incoming;
use crate::cli::{Cli, Command, PlanArgs};
use crate::commands::plan::{Advice, Curve, Plan, Question, curves, quality_of, show};
use crate::setting::{self, Places};

/// What is wanted of a query beside its ranking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// The ranking alone.
    Ranking,
    /// Advice, and curves of a candidate beside others.
    Plan(usize),
    /// A candidate op by op.
    Ops(usize),
    /// Smaller batches too.
    Frontier,
    /// The map, but for the columns of these bits.
    Map(u64),
    /// What policies were measured to lose.
    Quality,
}

/// A query by its number, and what is wanted of it.
#[derive(Clone, Debug)]
pub struct Request {
    /// Grows with every change of the inputs.
    pub query: u64,
    /// Arguments of `plan`.
    pub args: Vec<String>,
    pub want: Want,
}

/// A part of an answer.
#[derive(Debug)]
pub enum Part {
    Found(Box<Found>),
    Advised(Box<Advised>),
    Curves(usize, Vec<Curve>),
    Ops(usize, Option<Box<Ops>>),
    Frontier(Box<Found>),
    Axes(Box<Axes>),
    Column(Column),
    Quality(Option<Box<Measured>>),
    Failed(String),
}

/// A part and the number of its query.
#[derive(Debug)]
pub struct Answered {
    pub query: u64,
    pub part: Part,
}

/// The newest request.
#[derive(Default)]
pub struct Slot {
    request: Mutex<Option<Request>>,
    filled: Condvar,
}

impl Slot {
    /// Puts a request in the place of what waits.
    pub fn put(&self, request: Request) {
        if let Ok(mut slot) = self.request.lock() {
            *slot = Some(request);
        }
        self.filled.notify_one();
    }

    fn take(&self) -> Option<Request> {
        let slot = self.request.lock().ok()?;
        self.filled.wait_while(slot, |slot| slot.is_none()).ok()?.take()
    }

    fn is_full(&self) -> bool {
        self.request.lock().is_ok_and(|slot| slot.is_some())
    }
}

/// What is known of the last query.
#[derive(Default)]
pub struct Worker {
    query: u64,
    args: Option<Arc<PlanArgs>>,
    plan: Option<Plan>,
    advised: bool,
}

/// Computes until nobody listens.
pub fn work(places: &Places, slot: &Slot, out: &Sender<Incoming>) {
    let mut worker = Worker::default();
    while let Some(request) = slot.take() {
        let mut open = true;
        worker.answer(places, &request, &|| slot.is_full(), &mut |part| {
            let answered = Answered { query: request.query, part };
            open &= out.send(Incoming::Answered(Box::new(answered))).is_ok();
        });
        if !open {
            return;
        }
    }
}

/// Arguments of `plan` as its flags; the parser's own words where they are none.
pub fn plan_args(args: &[String]) -> Result<PlanArgs> {
    let words = ["batchmax", "plan"].map(str::to_owned).into_iter().chain(args.iter().cloned());
    let cli = Cli::try_parse_from(words).map_err(|error| {
        let text = error.to_string();
        let first = text.split("\n\n").next().unwrap_or_default();
        anyhow!("{}", first.trim_start_matches("error: ").replace('\n', " "))
    })?;
    match cli.command {
        Some(Command::Plan(command)) => Ok(command.plan),
        _ => Err(anyhow!("this is not a plan")),
    }
}

impl Worker {
    /// Answers in parts; stops between them where `stale` says so.
    pub fn answer(
        &mut self,
        places: &Places,
        request: &Request,
        stale: &dyn Fn() -> bool,
        send: &mut dyn FnMut(Part),
    ) {
        if let Err(error) = self.parts(places, request, stale, send) {
            send(Part::Failed(format!("{error:#}")));
        }
    }

    fn parts(
        &mut self,
        places: &Places,
        request: &Request,
        stale: &dyn Fn() -> bool,
        send: &mut dyn FnMut(Part),
    ) -> Result<()> {
        if request.want == Want::Quality {
            let args = plan_args(&request.args)?;
            let model = setting::model(places, &args.model)?;
            let found = quality_of(places, &model)?;
            let measured = found
                .map(|quality| Box::new(Measured { own: quality.name == model.name, quality }));
            send(Part::Quality(measured));
        }
        let known = self.query == request.query && self.plan.is_some();
        let args = match self.args.clone().filter(|_| known) {
            Some(args) => args,
            None => {
                *self = Self { query: request.query, ..Self::default() };
                Arc::new(plan_args(&request.args)?)
            }
        };
        let question = Question::new(places, &args)?;
        if !known {
            let plan = question.plan()?;
            send(Part::Found(Box::new(Found::of(&question, &plan))));
            self.plan = Some(plan);
            self.args = Some(args.clone());
        }
        let Some(plan) = &self.plan else { return Ok(()) };
        if stale() {
            return Ok(());
        }
        match request.want {
            Want::Ranking | Want::Quality => {}
            Want::Plan(selected) => {
                send(Part::Curves(selected, curves(&question, plan, selected)?));
                if !self.advised && !stale() {
                    let advice = Advice::of(&question, plan)?;
                    send(Part::Advised(Box::new(advised(&question, plan, &advice))));
                    self.advised = true;
                }
            }
            Want::Ops(selected) => {
                let found = plan.candidates.get(selected).map(|c| ops(&question, plan, c));
                let found = found.transpose()?.flatten();
                send(Part::Ops(selected, found.map(Box::new)));
            }
            Want::Frontier => {
                let args = PlanArgs { pareto: true, ..(*args).clone() };
                let question = Question::new(places, &args)?;
                let plan = question.plan()?;
                send(Part::Frontier(Box::new(Found::of(&question, &plan))));
            }
            Want::Map(known) => {
                let Some(axes) = Axes::of(&question, plan) else { return Ok(()) };
                send(Part::Axes(Box::new(axes.clone())));
                for index in axes.order() {
                    if stale() {
                        break;
                    }
                    if known >> index & 1 == 1 {
                        continue;
                    }
                    send(Part::Column(column(&question, plan, &axes, index)?));
                }
            }
        }
        Ok(())
    }
}

fn advised(question: &Question<'_>, plan: &Plan, advice: &Advice) -> Advised {
    let lines = |text: String| text.lines().map(str::to_owned).collect::<Vec<_>>();
    Advised {
        recommended: advice.recommended,
        changes: advice.changes.iter().map(|c| show::change(question, c)).collect(),
        pays: advice.crossings.as_ref().map_or_else(Vec::new, |c| lines(show::pays(c))),
        verdict: lines(show::verdict(question, plan, advice)),
    }
}
