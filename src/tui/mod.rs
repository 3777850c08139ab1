//! The planner to look at. [`app`] is the state, [`update`] what keys do to it, [`keys`] the one table of keys, [`worker`] the
//! thread that asks the planner, [`draw`] and [`screens`] what is seen; [`run()`] ties them to a terminal. Every number comes from
//! `commands::plan` and `sim::plan`: nothing here computes one.

mod answer;
mod app;
mod command;
mod draw;
mod export;
mod form;
mod keys;
mod map;
mod on_screen;
mod picker;
mod pins;
mod plot;
mod rows;
mod run;
mod screens;
mod terminal;
#[cfg(test)]
mod tests;
mod text;
mod theme;
mod trial;
mod update;
mod widgets;
mod worker;

pub use run::run;
