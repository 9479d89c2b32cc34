//! ACPI's fixed hardware: the power button, and the registers by which a guest switches itself off or resets.
//!
//! Pure: ports and values in, what happens out. The interrupt is a level that the owner of this brings to its pin.

use crate::acpi::SLEEP_OFF;
use crate::arch::layout;

/// The registers.
///
/// # Source
/// ACPI 6.5 §4.8.3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Power {
    status: u16,
    enable: u16,
    control: u16,
}

/// What a guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    Off,
    Reset,
}

impl Power {
    /// Whether `port` is one of these registers.
    pub(crate) fn has(port: u16) -> bool {
        (layout::PM1_EVENT..layout::PM1_CONTROL + 2).contains(&port)
    }

    /// The button is pressed.
    pub(crate) fn press(&mut self) {
        self.status |= BUTTON;
    }

    /// Whether the interrupt stands.
    pub(crate) fn interrupts(&self) -> bool {
        self.status & self.enable & BUTTON != 0
    }

    /// Reads consecutive bytes.
    pub(crate) fn read(&self, port: u16, bytes: &mut [u8]) {
        let [s0, s1] = self.status.to_le_bytes();
        let [e0, e1] = self.enable.to_le_bytes();
        // The machine is never in legacy mode.
        let [c0, c1] = (self.control | SCI_ENABLED).to_le_bytes();
        let all = [s0, s1, e0, e1, c0, c1];
        let start = usize::from(port.saturating_sub(layout::PM1_EVENT));
        for (n, byte) in bytes.iter_mut().enumerate() {
            *byte = all.get(start + n).copied().unwrap_or(0);
        }
    }

    /// Writes consecutive bytes.
    pub(crate) fn write(&mut self, port: u16, bytes: &[u8]) -> Option<Wish> {
        let mut wish = None;
        for (n, byte) in (0u16..).zip(bytes) {
            let register = port.saturating_sub(layout::PM1_EVENT).saturating_add(n);
            match register {
                // Writing one clears.
                0 => self.status &= !u16::from(*byte),
                1 => self.status &= !(u16::from(*byte) << 8),
                2 => self.enable = self.enable & 0xff00 | u16::from(*byte),
                3 => self.enable = self.enable & 0xff | u16::from(*byte) << 8,
                4 => self.control = self.control & 0xff00 | u16::from(*byte),
                5 => {
                    // The bit that enters the sleep is not kept.
                    self.control = self.control & 0xff | u16::from(*byte & !SLEEP_NOW) << 8;
                    let off = byte >> 2 & 7 == SLEEP_OFF;
                    wish = (byte & SLEEP_NOW != 0 && off).then_some(Wish::Off).or(wish);
                }
                _ => {}
            }
        }
        wish
    }
}

/// What a write to a reset port asks for.
pub(crate) fn reset_wish(port: u16, bytes: &[u8]) -> Option<Wish> {
    match (port, bytes) {
        (layout::RESET, [value]) if value & RESET_NOW != 0 => Some(Wish::Reset),
        (layout::KEYBOARD, [PULSE_RESET]) => Some(Wish::Reset),
        _ => None,
    }
}

const BUTTON: u16 = 1 << 8;
const SCI_ENABLED: u16 = 1;
/// In the control register's high byte.
const SLEEP_NOW: u8 = 1 << 5;
const RESET_NOW: u8 = 1 << 2;
const PULSE_RESET: u8 = 0xfe;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_button_interrupts_until_the_guest_has_seen_it() {
        let mut power = Power::default();
        power.press();
        assert!(!power.interrupts());
        power.write(0x602, &[0, 1]);
        assert!(power.interrupts());
        let mut status = [0; 2];
        power.read(0x600, &mut status);
        assert_eq!(status, [0, 1]);
        power.write(0x600, &[0, 1]);
        assert!(!power.interrupts());
    }

    #[test]
    fn only_the_right_sleep_is_off() {
        let mut power = Power::default();
        assert_eq!(power.write(0x604, &0x1400u16.to_le_bytes()), None);
        assert_eq!(power.write(0x604, &0x2400u16.to_le_bytes()), None);
        assert_eq!(power.write(0x604, &0x3400u16.to_le_bytes()), Some(Wish::Off));
        assert_eq!(reset_wish(0xcf9, &[6]), Some(Wish::Reset));
        assert_eq!(reset_wish(0xcf9, &[2]), None);
        assert_eq!(reset_wish(0xcf9, &[6, 6, 6, 6]), None);
        assert_eq!(reset_wish(0x64, &[0xfe]), Some(Wish::Reset));
    }
}
