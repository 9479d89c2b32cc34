//! Exact decimal numbers of any size, and the one place that rounds.

use std::fmt;

use num_bigint::BigInt;
use num_bigint::BigUint;
use num_bigint::Sign;
use num_integer::Integer;

/// `digits × 10^-scale`, with no zero at the end of the fraction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decimal {
    digits: BigInt,
    scale: u32,
}

impl Decimal {
    /// 0.
    pub const ZERO: Self = Self { digits: BigInt::ZERO, scale: 0 };

    /// `raw / size × price`: exact if that is a finite decimal of at most [`EXACT_DIGITS`] digits, before and after the
    /// point together; else rounded half to even at [`ROUNDED_SCALE`] digits after the point. `size` is not zero.
    pub(crate) fn of_ratio(raw: u128, size: u128, price: &Self) -> Self {
        let numer = BigInt::from(raw) * &price.digits;
        let denom = BigUint::from(size) * power(10, price.scale);
        let common = numer.magnitude().gcd(&denom);
        if common == BigUint::ZERO {
            return Self::ZERO;
        }
        let (numer, denom) = (numer / BigInt::from(common.clone()), denom / common);
        exact(&numer, &denom).unwrap_or_else(|| rounded(&numer, &denom))
    }

    /// 1.
    pub(crate) fn one() -> Self {
        Self { digits: BigInt::from(1), scale: 0 }
    }

    /// Reads a decimal number: perhaps a minus sign, digits, perhaps a point and digits.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix('-').unwrap_or(text);
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let plain = |t: &str| t.bytes().all(|b| b.is_ascii_digit());
        let pointed = digits.contains('.') != fraction.is_empty();
        if whole.is_empty() || !pointed || !plain(whole) || !plain(fraction) || text.len() > 128 {
            return None;
        }
        let magnitude = BigInt::parse_bytes(format!("{whole}{fraction}").as_bytes(), 10)?;
        let digits = if text.starts_with('-') { -magnitude } else { magnitude };
        Some(Self { digits, scale: u32::try_from(fraction.len()).ok()? }.trimmed())
    }

    /// The exact sum.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        let scale = self.scale.max(other.scale);
        let scaled = |d: &Self| &d.digits * BigInt::from(power(10, scale - d.scale));
        Self { digits: scaled(self) + scaled(other), scale }.trimmed()
    }

    fn trimmed(mut self) -> Self {
        let ten = BigInt::from(10);
        while self.scale > 0 {
            let (shorter, digit) = self.digits.div_rem(&ten);
            if digit != BigInt::ZERO {
                break;
            }
            self = Self { digits: shorter, scale: self.scale - 1 };
        }
        self
    }
}

/// The fraction as a decimal, if it is a finite one that is short enough. It is in lowest terms.
fn exact(numer: &BigInt, denom: &BigUint) -> Option<Decimal> {
    let (twos, rest) = strip(denom.clone(), 2);
    let (fives, rest) = strip(rest, 5);
    let scale = twos.max(fives);
    if rest != BigUint::from(1u8) || scale > EXACT_DIGITS {
        return None;
    }
    let digits = numer * BigInt::from(power(10, scale) / denom);
    (digits.magnitude() < &power(10, EXACT_DIGITS)).then(|| Decimal { digits, scale }.trimmed())
}

/// How often `prime` divides `n`, and what is left.
fn strip(mut n: BigUint, prime: u32) -> (u32, BigUint) {
    let mut times = 0;
    // A denominator is at most 2^96 × 10^18, so this ends after some hundred steps; beyond `EXACT_DIGITS` it is moot.
    while times <= EXACT_DIGITS {
        let (quotient, rest) = n.div_rem(&BigUint::from(prime));
        if rest != BigUint::ZERO {
            break;
        }
        (n, times) = (quotient, times + 1);
    }
    (times, n)
}

/// The fraction rounded half to even.
fn rounded(numer: &BigInt, denom: &BigUint) -> Decimal {
    let scaled = numer.magnitude() * power(10, ROUNDED_SCALE);
    let (mut digits, rest) = scaled.div_rem(denom);
    let twice = rest * 2u8;
    if twice > *denom || (twice == *denom && digits.is_odd()) {
        digits += 1u8;
    }
    let sign = if numer.sign() == Sign::Minus { Sign::Minus } else { Sign::Plus };
    Decimal { digits: BigInt::from_biguint(sign, digits), scale: ROUNDED_SCALE }.trimmed()
}

impl fmt::Display for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let minus = if self.digits.sign() == Sign::Minus { "-" } else { "" };
        // The scale is at most 128, so it fits.
        let scale = usize::try_from(self.scale).unwrap_or(0);
        let digits = format!("{:0>width$}", self.digits.magnitude().to_string(), width = scale + 1);
        let (whole, fraction) = digits.split_at(digits.len() - scale);
        let point = if fraction.is_empty() { "" } else { "." };
        write!(f, "{minus}{whole}{point}{fraction}")
    }
}

fn power(base: u32, exponent: u32) -> BigUint {
    BigUint::from(base).pow(exponent)
}

/// The most digits of an amount that is kept exact.
pub const EXACT_DIGITS: u32 = 28;
/// The digits after the point of an amount that is not.
pub const ROUNDED_SCALE: u32 = 9;
