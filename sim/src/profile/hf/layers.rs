//! Which layers of a configuration slide.

use serde_json::Value;

use super::Config;
use crate::profile::{ProfileError, SlidingWindow};

/// The window, if it hides anything: one as long as the context does not.
pub(super) fn sliding_window(
    config: &Config<'_>,
    class: &str,
    layers: u32,
    context: u32,
) -> Result<Option<SlidingWindow>, ProfileError> {
    let tokens = config.optional_whole("sliding_window")?.unwrap_or(0);
    let used = config.flag("use_sliding_window")?;
    let qwen = class.starts_with("Qwen");
    if tokens == 0 || tokens >= context || used == Some(false) || (qwen && used.is_none()) {
        return Ok(None);
    }
    let listed = match config.get("layer_types") {
        Some(Value::Array(types)) => Some(types),
        _ => None,
    };
    let slides: Vec<bool> = if let Some(types) = listed {
        if types.len() != layers as usize {
            let problem = format!("{} entries for {layers} layers", types.len());
            return Err(config.invalid("layer_types", problem));
        }
        types.iter().map(|t| t.as_str() == Some("sliding_attention")).collect()
    } else if class.starts_with("Gemma2") {
        return Ok(Some(SlidingWindow { tokens, every: 2, full_at: 1 }));
    } else if qwen {
        let first = config.optional_whole("max_window_layers")?.unwrap_or(0);
        // `layers` is only bounded by validation, which comes later.
        (0..layers.min(1 << 12)).map(|layer| layer >= first).collect()
    } else {
        return Ok(Some(SlidingWindow { tokens, every: 1, full_at: 1 }));
    };
    match pattern(&slides) {
        Some(None) => Ok(None),
        Some(Some((every, full_at))) => Ok(Some(SlidingWindow { tokens, every, full_at })),
        None => Err(config.invalid(
            "sliding_window",
            "sliding and full layers alternate irregularly: not described yet",
        )),
    }
}

/// `Some(None)`: no layer slides. `Some((every, full_at))`: layer l slides unless `l % every == full_at`.
fn pattern(slides: &[bool]) -> Option<Option<(u32, u32)>> {
    if !slides.contains(&true) {
        return Some(None);
    }
    let Some(full_at) = slides.iter().position(|slides| !slides) else { return Some(Some((1, 1))) };
    (full_at + 1..=slides.len().max(full_at + 1))
        .find(|every| {
            slides.iter().enumerate().all(|(l, slides)| *slides == (l % every != full_at))
        })
        .map(|every| Some((every as u32, full_at as u32)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regular_patterns_are_found_and_irregular_ones_are_not() {
        assert_eq!(pattern(&[false; 4]), Some(None));
        assert_eq!(pattern(&[true; 4]), Some(Some((1, 1))));
        assert_eq!(pattern(&[true, false, true, false]), Some(Some((2, 1))));
        assert_eq!(pattern(&[false, true, false, true]), Some(Some((2, 0))));
        assert_eq!(pattern(&[true, true, true, false, true, true]), Some(Some((4, 3))));
        assert_eq!(pattern(&[false, false, true, true]), None);
    }
}
