//! Decimal arithmetic as at school, digit by digit: slow, and easy to see right.

use std::cmp::Ordering;
use std::fmt;

/// The most digits of an amount that stays exact.
const EXACT: usize = 28;
/// The digits after the point of one that does not.
const ROUNDED: usize = 9;

/// A decimal number: a sign, digits (most significant first) and how many of them stand after the point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Digits {
    minus: bool,
    digits: Vec<u8>,
    scale: usize,
}

impl Digits {
    pub(super) fn zero() -> Self {
        Self { minus: false, digits: vec![0], scale: 0 }
    }

    /// Reads what [`DecimalText`](crate::unit::DecimalText) allows, and whole numbers of any length.
    pub(super) fn parse(text: &str) -> Self {
        let (minus, text) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let digits = whole.bytes().chain(fraction.bytes()).map(|b| b.saturating_sub(b'0').min(9)).collect();
        Self { minus, digits, scale: fraction.len() }.trimmed()
    }

    pub(super) fn times(&self, other: &Self) -> Self {
        let mut out = vec![0u32; self.digits.len() + other.digits.len()];
        for (i, a) in self.digits.iter().rev().enumerate() {
            for (j, b) in other.digits.iter().rev().enumerate() {
                if let Some(place) = out.get_mut(i + j) {
                    *place += u32::from(*a) * u32::from(*b);
                }
            }
        }
        let mut carry = 0;
        let digits: Vec<u8> = out.into_iter().map(|sum| digit(sum, &mut carry)).collect();
        let digits = digits.into_iter().rev().collect();
        Self { minus: self.minus != other.minus, digits, scale: self.scale + other.scale }.trimmed()
    }

    /// Divided by `by`, which is above zero and below 2^120: exact if that is short enough, else rounded half to even.
    pub(super) fn over(&self, by: u128) -> Self {
        let mut rest = 0u128;
        let mut digits = Vec::new();
        let mut put = |next: u128, rest: &mut u128| {
            *rest = *rest * 10 + next;
            digits.push(u8::try_from(*rest / by).unwrap_or(9));
            *rest %= by;
        };
        for next in &self.digits {
            put(u128::from(*next), &mut rest);
        }
        let mut scale = self.scale;
        while rest != 0 && scale < EXACT {
            put(0, &mut rest);
            scale += 1;
        }
        let out = Self { minus: self.minus, digits, scale }.trimmed();
        if rest == 0 && out.digits.len() <= EXACT && out.scale <= EXACT {
            out
        } else {
            out.rounded(rest != 0)
        }
    }

    /// Rounded half to even at [`ROUNDED`] digits; `more`: something follows after the last digit.
    fn rounded(mut self, more: bool) -> Self {
        while self.digits.len() <= self.scale {
            self.digits.insert(0, 0);
        }
        if self.scale <= ROUNDED {
            return self.trimmed();
        }
        let tail = self.digits.split_off(self.digits.len() - (self.scale - ROUNDED));
        self.scale = ROUNDED;
        let odd = self.digits.last().is_some_and(|d| d % 2 == 1);
        let beyond = more || tail.iter().skip(1).any(|d| *d != 0);
        let up = match tail.first().map(|d| d.cmp(&5)) {
            Some(Ordering::Greater) => true,
            Some(Ordering::Equal) => beyond || odd,
            _ => false,
        };
        if up {
            let minus = self.minus;
            let unit = Self { minus, digits: vec![1], scale: ROUNDED };
            return self.plus(&unit);
        }
        self.trimmed()
    }

    pub(super) fn plus(&self, other: &Self) -> Self {
        let (a, b) = (self.aligned(other), other.aligned(self));
        let scale = self.scale.max(other.scale);
        if self.minus == other.minus {
            return Self { minus: self.minus, digits: add(&a, &b), scale }.trimmed();
        }
        let (minus, digits) =
            if a >= b { (self.minus, subtract(&a, &b)) } else { (other.minus, subtract(&b, &a)) };
        Self { minus, digits, scale }.trimmed()
    }

    /// The digits with zeroes at both ends, so that they stand under those of `other`.
    fn aligned(&self, other: &Self) -> Vec<u8> {
        let whole = |d: &Self| d.digits.len().saturating_sub(d.scale);
        let lead = whole(self).max(whole(other)) + self.scale.max(self.digits.len());
        let mut digits = vec![0; (lead + 1).saturating_sub(self.digits.len())];
        digits.extend(&self.digits);
        digits.extend(vec![0; other.scale.saturating_sub(self.scale)]);
        let want = whole(self).max(whole(other)) + self.scale.max(other.scale) + 1;
        while digits.len() > want {
            digits.remove(0);
        }
        while digits.len() < want {
            digits.insert(0, 0);
        }
        digits
    }

    fn trimmed(mut self) -> Self {
        while self.scale > 0 && self.digits.last() == Some(&0) {
            self.digits.pop();
            self.scale -= 1;
        }
        let zeroes = self.digits.iter().take_while(|d| **d == 0).count();
        self.digits.drain(..zeroes);
        if self.digits.is_empty() {
            return Self::zero();
        }
        self
    }
}

fn digit(sum: u32, carry: &mut u32) -> u8 {
    let sum = sum + *carry;
    *carry = sum / 10;
    u8::try_from(sum % 10).unwrap_or(0)
}

fn add(a: &[u8], b: &[u8]) -> Vec<u8> {
    let mut carry = 0;
    let sums: Vec<u8> =
        a.iter().rev().zip(b.iter().rev()).map(|(a, b)| digit(u32::from(a + b), &mut carry)).collect();
    sums.into_iter().rev().collect()
}

/// `a - b`, of the same length, `a` at least `b`.
fn subtract(a: &[u8], b: &[u8]) -> Vec<u8> {
    let mut borrow = 0;
    let pairs = a.iter().rev().zip(b.iter().rev());
    let differences: Vec<u8> = pairs
        .map(|(a, b)| {
            let need = b + borrow;
            borrow = u8::from(*a < need);
            a + 10 * borrow - need
        })
        .collect();
    differences.into_iter().rev().collect()
}

impl fmt::Display for Digits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.minus {
            f.write_str("-")?;
        }
        let mut digits = vec![0; (self.scale + 1).saturating_sub(self.digits.len())];
        digits.extend(&self.digits);
        let point = digits.len() - self.scale;
        for (at, digit) in digits.iter().enumerate() {
            if at == point {
                f.write_str(".")?;
            }
            write!(f, "{digit}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn over(a: &str, b: u128) -> String {
        Digits::parse(a).over(b).to_string()
    }

    #[test]
    fn a_third_is_rounded_and_an_eighth_is_not() {
        assert_eq!(over("1", 8), "0.125");
        assert_eq!(over("1", 3), "0.333333333");
        assert_eq!(over("2", 3), "0.666666667");
        assert_eq!(over("-2", 3), "-0.666666667");
        assert_eq!(over("3600000000000", 3_600_000_000_000), "1");
        // 0.0000000005 × ⅓ … stays below half of the last digit.
        assert_eq!(over("0.000000001", 3), "0");
        assert_eq!(Digits::parse("-0.5").plus(&Digits::parse("10.25")).to_string(), "9.75");
    }

    proptest! {
        #[test]
        fn it_agrees_with_the_machine_where_that_can(a in -1_000_000_000i64..1_000_000_000, b in -1_000_000i64..1_000_000) {
            let (x, y) = (Digits::parse(&a.to_string()), Digits::parse(&b.to_string()));
            prop_assert_eq!(x.times(&y).to_string(), (i128::from(a) * i128::from(b)).to_string());
            prop_assert_eq!(x.plus(&y).to_string(), (i128::from(a) + i128::from(b)).to_string());
        }
    }
}
