//! Numbers of one byte: sign, four bits of exponent, three of mantissa (e4m3: no infinities, one NaN, largest 448).

/// Nearest e4m3 number, ties to even; beyond 448 it is 448.
#[inline(always)]
pub(crate) fn fp8_bits(x: f32) -> u8 {
    let magnitude = f32::from_bits(x.to_bits() & 0x7fff_ffff);
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    if magnitude.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = magnitude.min(448.0);
    let bits = if magnitude < 1.0 / 64.0 {
        // Multiples of 2^-9: adding 1.5 * 2^23 rounds to whole numbers, and 8 of them are the least normal number.
        (magnitude * 512.0 + 12_582_912.0).to_bits() & 0xf
    } else {
        let bits = magnitude.to_bits();
        let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
        (rounded >> 20) - ((127 - 7) << 3)
    };
    sign | bits as u8
}

/// The number of an e4m3 byte.
#[inline(always)]
pub(crate) fn fp8_value(bits: u8) -> f32 {
    let magnitude = u32::from(bits & 0x7f);
    let value = if magnitude == 0x7f {
        f32::NAN
    } else if magnitude < 8 {
        magnitude as f32 / 512.0
    } else {
        f32::from_bits((magnitude << 20) + ((127 - 7) << 23))
    };
    if bits >> 7 == 1 { -value } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_by_hand() {
        for (bits, value) in [
            (0x00, 0.0),
            (0x01, 1.0 / 512.0),
            (0x07, 7.0 / 512.0),
            (0x08, 1.0 / 64.0),
            (0x38, 1.0),
            (0x39, 1.125),
            (0xc0, -2.0),
            (0x7e, 448.0),
        ] {
            assert_eq!((fp8_value(bits), fp8_bits(value)), (value, bits));
        }
        assert_eq!(fp8_bits(-0.0), 0x80);
        assert!(fp8_value(fp8_bits(f32::NAN)).is_nan());
    }

    #[test]
    fn rounding_is_to_the_nearest_and_ties_go_to_even() {
        let numbers: Vec<f32> = (0..0x7fu8).map(fp8_value).collect();
        for (bits, pair) in (0u8..).zip(numbers.windows(2)) {
            let middle = (pair[0] + pair[1]) / 2.0;
            let even = bits + (bits & 1);
            assert_eq!(fp8_bits(middle), even, "{middle}");
            assert_eq!(fp8_bits(-middle), even | 0x80);
            assert_eq!(fp8_bits(middle.next_down()), bits);
            assert_eq!(fp8_bits(middle.next_up()), bits + 1);
        }
        assert_eq!(fp8_bits(1e9), 0x7e);
        assert_eq!(fp8_bits(f32::NEG_INFINITY), 0xfe);
        assert_eq!(fp8_bits(1e-20), 0);
    }
}
