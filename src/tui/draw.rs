//! The frame around the screens: header, inputs, status, footer, and what lies above all.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::Modifier;

use super::app::{App, Mode, SCREENS, Screen};
use super::form::FIELDS;
use super::keys::{Binding, Context, KEYS, Message, title};
use super::screens;
use super::theme::{ACCENT, BAD, CURSOR, DIM, GOOD, TEXT, WARN, finish};
use super::trial::Trial;
use super::widgets::{frame, parts, put, put_right, wrapped};
use ratatui::widgets::{Clear, Widget};

/// The smallest terminal that holds a screen.
const SMALLEST: (u16, u16) = (60, 15);
/// Columns of the inputs.
const INPUTS: u16 = 30;

/// Draws everything. Pure: the state is all that it looks at.
pub fn draw(app: &App, buffer: &mut Buffer) {
    let area = buffer.area;
    if area.width < SMALLEST.0 || area.height < SMALLEST.1 {
        let text = format!(
            "batchmax needs {} x {} cells, here are {} x {}; q quits",
            SMALLEST.0, SMALLEST.1, area.width, area.height
        );
        wrapped(buffer, area, &text, TEXT);
    } else {
        whole(app, buffer, area);
    }
    finish(app.theme, buffer);
}

fn whole(app: &App, buffer: &mut Buffer, area: Rect) {
    header(app, buffer, Rect { height: 2, ..area });
    let body = Rect { y: area.y + 2, height: area.height - 4, ..area };
    let inputs = app.inputs || area.width >= 110 || app.screen == Screen::Plan;
    let width = if inputs { INPUTS } else { 0 };
    if inputs {
        form(app, buffer, Rect { width, ..body });
    }
    let rest = Rect { x: body.x + width, width: body.width - width, ..body };
    screens::draw(app, buffer, rest);
    status(app, buffer, Rect { y: area.bottom() - 2, height: 1, ..area });
    footer(app, buffer, Rect { y: area.bottom() - 1, height: 1, ..area });
    match &app.mode {
        Mode::Picking(_) => screens::picker::draw(app, buffer, area),
        Mode::Help(at) => help(*at, buffer, area),
        _ => {}
    }
}

fn header(app: &App, buffer: &mut Buffer, area: Rect) {
    let mut x = area.x + put(buffer, area.x, area.y, area.width, " batchmax ", ACCENT) + 1;
    for (i, screen) in SCREENS.into_iter().enumerate() {
        let style = if screen == app.screen { CURSOR.patch(ACCENT) } else { TEXT };
        let text = format!(" {} {} ", i + 1, screen.name());
        x += put(buffer, x, area.y, area.right().saturating_sub(x), &text, style);
    }
    let pins = app.pins.len();
    if pins > 0 {
        put_right(buffer, area, area.y, &format!("{pins} pinned "), DIM);
    }
    let sentence = app.found().map_or_else(String::new, |(found, _)| found.head.clone());
    let room = area.width - 2;
    put(buffer, area.x + 1, area.y + 1, room, &shortened(sentence, room), DIM);
}

/// Without the details of a remark in brackets, where the line is too short for them: what is asked stands behind it.
fn shortened(sentence: String, room: u16) -> String {
    let long = sentence.chars().count() > usize::from(room);
    match (long, sentence.split_once(": "), sentence.split_once(')')) {
        (true, Some((before, _)), Some((_, after))) => format!("{before}){after}"),
        _ => sentence,
    }
}

fn form(app: &App, buffer: &mut Buffer, area: Rect) {
    let inner = frame(buffer, area, "What is asked", app.inputs);
    let room = inner.height as usize;
    let first = app.field.saturating_sub(room / 2).min(FIELDS.len().saturating_sub(room));
    for (line, (index, field)) in FIELDS.iter().enumerate().skip(first).take(room).enumerate() {
        let y = inner.y + line as u16;
        let here = index == app.field;
        let name = if here && app.inputs { ACCENT } else { TEXT };
        put(buffer, inner.x, y, 11, field.label, name);
        let at = Rect { x: inner.x + 11, y, width: inner.width - 11, height: 1 };
        if let Mode::Typing { field: typed, line, .. } = &app.mode
            && *typed == index
        {
            line_of_text(buffer, at, line);
            continue;
        }
        let value = app.values.get(index);
        let (text, style) = match value {
            "" => (field.empty, DIM),
            value if value == field.usual => (value, TEXT),
            value => (value, ACCENT),
        };
        if here && app.inputs {
            put(buffer, at.x, y, 1, "◂", DIM);
            let used = put(buffer, at.x + 1, y, at.width - 2, text, style);
            put(buffer, at.x + 1 + used, y, 1, "▸", DIM);
        } else {
            put(buffer, at.x + 1, y, at.width - 1, text, style);
        }
    }
    let below = FIELDS.len().saturating_sub(first + room);
    if below > 0 || first > 0 {
        let text = format!(" ↑{first} ↓{below} ");
        put_right(buffer, Rect { width: area.width - 1, ..area }, area.bottom() - 1, &text, DIM);
    }
}

/// A text with its cursor.
pub fn line_of_text(buffer: &mut Buffer, at: Rect, line: &super::text::Line) {
    let (text, cursor) = line.window(at.width as usize);
    buffer.set_style(at, ACCENT.add_modifier(Modifier::UNDERLINED));
    buffer.set_stringn(at.x, at.y, &text, at.width as usize, ACCENT);
    if let Some(cell) = buffer.cell_mut((at.x + cursor as u16, at.y)) {
        cell.set_style(CURSOR);
    }
}

/// What is typed, what went wrong, what is awaited, or what was done.
fn status(app: &App, buffer: &mut Buffer, area: Rect) {
    let prompt = match &app.mode {
        Mode::Filtering(line) => Some((" filter: ", line)),
        Mode::Exporting(line) => Some((" export to (json, txt, md, csv, html, svg): ", line)),
        _ => None,
    };
    if let Some((label, line)) = prompt {
        let used = put(buffer, area.x, area.y, area.width, label, TEXT);
        let width = area.width.saturating_sub(used + 1).min(60);
        return line_of_text(buffer, Rect { x: area.x + used, width, ..area }, line);
    }
    let inner = Rect { x: area.x + 1, width: area.width - 2, ..area };
    if let Some(said) = &app.said {
        let (sign, style) = if said.bad { ("× ", BAD) } else { ("✓ ", GOOD) };
        return parts(buffer, inner, area.y, &[(sign, style), (&said.text, TEXT)]);
    }
    if let Some(why) = app.failed() {
        let why = why.replace("; hint: ", " — ");
        return parts(buffer, inner, area.y, &[("× ", BAD), (&why, TEXT)]);
    }
    if let Trial::Going(going) = &app.trial
        && app.screen != Screen::Run
    {
        let text = format!("running: {} of {} steps", going.done, going.total);
        return parts(buffer, inner, area.y, &[("… ", WARN), (&text, TEXT)]);
    }
    if app.waits() {
        let text = match app.found() {
            Some(_) => {
                format!("asking; the answer shown is {:.1} s old", app.now - app.answers.found_at)
            }
            None => format!("asking for {:.1} s", app.now - app.asked_at),
        };
        return parts(buffer, inner, area.y, &[("… ", WARN), (&text, DIM)]);
    }
    const LEGEND: &str = crate::report::table::LEGEND;
    let wide = LEGEND.chars().count() as u16;
    let verdict = app.verdict().filter(|_| app.screen == Screen::Plan).unwrap_or_default();
    let long = verdict.chars().count() as u16;
    // The answer before the legend.
    if long + wide + 3 <= inner.width || verdict.is_empty() {
        put(buffer, inner.x, inner.y, inner.width, verdict, GOOD);
        put_right(buffer, inner, inner.y, LEGEND, DIM);
    } else {
        put(buffer, inner.x, inner.y, inner.width, verdict, GOOD);
    }
}

/// Whether a key would do something now.
fn enabled(app: &App, message: Message) -> bool {
    match message {
        Message::Undo => app.can_undo(),
        Message::Cancel => matches!(app.trial, Trial::Going(_)),
        Message::Start => app.run_arguments().is_ok(),
        Message::Recalibrate => app.can_run && !matches!(app.trial, Trial::Going(_)),
        Message::Unpin => !app.pins.is_empty(),
        Message::Mark => matches!(&app.mode, Mode::Picking(p) if p.several.is_some()),
        Message::Pin => app.candidate().is_some(),
        _ => true,
    }
}

fn footer(app: &App, buffer: &mut Buffer, area: Rect) {
    const HELP: &str = "? help ";
    let contexts = app.contexts();
    let lines = || KEYS.iter().filter(|b| b.footer && contexts.contains(&b.context));
    let helps = contexts.contains(&Context::Anywhere);
    let end = if helps { HELP.len() as u16 } else { 0 };
    let room = area.width - end;
    let mut x = area.x + 1;
    for binding in lines() {
        let key = binding.keys[0].name();
        let width = (key.chars().count() + binding.hint.chars().count() + 1) as u16;
        if x + width + 2 > area.x + room {
            break;
        }
        let (bold, style) = match enabled(app, binding.message) {
            true => (ACCENT, TEXT),
            false => (DIM, DIM),
        };
        x += put(buffer, x, area.y, width, &key, bold) + 1;
        x += put(buffer, x, area.y, width, binding.hint, style) + 3;
    }
    if helps {
        put_right(buffer, area, area.y, HELP, DIM);
    }
}

/// The table of keys.
fn help(at: usize, buffer: &mut Buffer, area: Rect) {
    let width = area.width.saturating_sub(8).min(64);
    let height = area.height.saturating_sub(4);
    let place = Rect { x: area.x + (area.width - width) / 2, y: area.y + 2, width, height };
    Clear.render(place, buffer);
    let inner = frame(buffer, place, "Keys (↑↓ scroll, Esc closes)", true);
    let mut lines: Vec<(String, String)> = Vec::new();
    let mut last = None;
    // What holds most of the time comes first.
    let rank = |c: Context| match c {
        Context::Anywhere => 0,
        Context::Inputs => 1,
        Context::On(_) => 2,
        Context::Field | Context::Picker | Context::Help => 3,
    };
    let mut table: Vec<&Binding> = KEYS.iter().collect();
    table.sort_by_key(|b| rank(b.context));
    for binding in table {
        if last != Some(binding.context) {
            lines.extend(last.map(|_| (String::new(), String::new())));
            lines.push((String::new(), title(binding.context)));
            last = Some(binding.context);
        }
        let keys: Vec<String> = binding.keys.iter().map(|k| k.name()).collect();
        lines.push((keys.join(" "), binding.hint.to_owned()));
    }
    let room = inner.height as usize;
    let first = at.min(lines.len().saturating_sub(room));
    for (line, (keys, hint)) in lines.iter().skip(first).take(room).enumerate() {
        let y = inner.y + line as u16;
        if keys.is_empty() {
            put(buffer, inner.x + 1, y, inner.width - 1, hint, ACCENT);
        } else {
            put(buffer, inner.x + 3, y, 16, keys, TEXT);
            put(buffer, inner.x + 20, y, inner.width.saturating_sub(20), hint, TEXT);
        }
    }
}
