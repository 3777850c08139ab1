//! One attention out of two over different keys.

/// Joins the attention of rows over some keys with that over others, in place: outputs weigh by what their softmax was
/// divided by. `lse` has a number per row and query head, `out` `head_dim` for each. What saw no keys weighs nothing.
///
/// # Panics
/// If the sizes do not fit each other.
pub fn join(
    out: &mut [f32],
    lse: &mut [f32],
    other_out: &[f32],
    other_lse: &[f32],
    head_dim: usize,
) {
    assert_eq!(lse.len(), other_lse.len(), "not the same rows");
    assert!(
        out.len() == lse.len() * head_dim && other_out.len() == out.len(),
        "not one output each"
    );
    let outs = out.chunks_exact_mut(head_dim).zip(other_out.chunks_exact(head_dim));
    for ((lse, other), (out, other_out)) in lse.iter_mut().zip(other_lse).zip(outs) {
        if *other == f32::NEG_INFINITY {
            continue;
        }
        let most = lse.max(*other);
        let (a, b) = ((*lse - most).exp(), (*other - most).exp());
        let (a, b) = (a / (a + b), b / (a + b));
        out.iter_mut().zip(other_out).for_each(|(x, y)| *x = *x * a + *y * b);
        *lse = most + ((*lse - most).exp() + (*other - most).exp()).ln();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attend::{AttendItem, AttendShape, attend_decode, attend_without};
    use crate::kv::KvFormat;
    use crate::testing::Layer;

    #[test]
    fn weights_by_hand() {
        // Sums of e^s of 3 and 1: three quarters and one.
        let (mut out, mut lse) = (vec![4.0, 0.0], vec![3f32.ln()]);
        join(&mut out, &mut lse, &[0.0, 4.0], &[0.0], 2);
        assert!((out[0] - 3.0).abs() < 1e-6 && (out[1] - 1.0).abs() < 1e-6, "{out:?}");
        assert!((lse[0] - 4f32.ln()).abs() < 1e-6);
        // Nothing changes nothing, and is changed by anything.
        join(&mut out, &mut lse, &[9.0, 9.0], &[f32::NEG_INFINITY], 2);
        assert!((out[0] - 3.0).abs() < 1e-6);
        let (mut out, mut lse) = (vec![0.0], vec![f32::NEG_INFINITY]);
        join(&mut out, &mut lse, &[2.0], &[0.5], 1);
        assert_eq!((out[0], lse[0]), (2.0, 0.5));
    }

    #[test]
    fn tokens_that_are_left_out_and_those_alone_make_the_whole() {
        let shape = AttendShape {
            heads: 6,
            kv_heads: 2,
            head_dim: 64,
            scale: 0.125,
            softcap: None,
            window: None,
        };
        let mut layer = Layer::new(2, shape, KvFormat::F16);
        layer.feed(3, &[1100, 7]);
        layer.feed(3, &[1, 1]);
        let items = || -> Vec<AttendItem<'_>> {
            let all = layer.caches.iter().enumerate();
            all.map(|(first_row, heads)| AttendItem { heads, first_row, rows: 1 }).collect()
        };
        let attend = |without: Option<Vec<Vec<u32>>>| {
            let (mut out, mut lse) = (vec![0.0; 2 * 6 * 64], vec![0.0; 2 * 6]);
            let (pool, width, qkv) = (&layer.pool, layer.width, &layer.qkv);
            let (items, lses) = (items(), Some(lse.as_mut_slice()));
            let threads = &layer.threads;
            match without {
                None => attend_decode(threads, pool, &items, &shape, qkv, width, &mut out, lses),
                Some(without) => attend_without(
                    threads, pool, &items, &without, &shape, qkv, width, &mut out, lses,
                ),
            }
            (out, lse)
        };
        // A whole part of 512 tokens is left out once, and everything of the short cache.
        let odd = |n: u32| (0..n).filter(|t| t % 3 == 0 || (512..1024).contains(t));
        let even = |n: u32| (0..n).filter(|t| t % 3 != 0 && !(512..1024).contains(t));
        let lists =
            |left: Vec<u32>, short: Vec<u32>| vec![left.clone(), left, short.clone(), short];
        let (mut out, mut lse) = attend(Some(lists(odd(1101).collect(), (0..8).collect())));
        assert!(
            lse[6..].iter().all(|l| *l == f32::NEG_INFINITY)
                && out[6 * 64..].iter().all(|x| *x == 0.0)
        );
        let (other, other_lse) = attend(Some(lists(even(1101).collect(), Vec::new())));
        join(&mut out, &mut lse, &other, &other_lse, 64);
        let (whole, whole_lse) = attend(None);
        for (x, y) in out.iter().zip(&whole).chain(lse.iter().zip(&whole_lse)) {
            assert!((x - y).abs() < 1e-5, "{x} for {y}");
        }
        assert!(attend(Some(vec![Vec::new(); 4])).0 == whole);
    }
}
