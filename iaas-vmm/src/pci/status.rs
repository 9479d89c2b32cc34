//! The one state machine of a virtio device's status, for every device behind this transport.

/// The status register.
///
/// # Source
/// virtio 1.2 §2.1, §3.1.1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Status(u8);

/// What a write to the status asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing beyond the register.
    Note,
    /// The driver wants the device as new.
    Reset,
    /// The driver has chosen features: accept them or not, by [`Status::accept`].
    Choose,
    /// The driver is ready.
    Start,
    /// No driver does this.
    Broken(&'static str),
}

impl Status {
    pub(super) fn byte(self) -> u8 {
        self.0
    }

    /// Whether the driver runs the device, and the device is well.
    pub(super) fn runs(self) -> bool {
        self.0 & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
    }

    /// Whether features can still be chosen.
    pub(super) fn chooses(self) -> bool {
        self.0 & (DRIVER | FEATURES_OK) == DRIVER
    }

    /// Whether queues can still be set up.
    pub(super) fn sets_up(self) -> bool {
        self.0 & (FEATURES_OK | DRIVER_OK | NEEDS_RESET) == FEATURES_OK
    }

    /// The device can do nothing more until it is reset.
    pub(super) fn fail(&mut self) {
        self.0 |= NEEDS_RESET;
    }

    /// The features that the driver chose are fine.
    pub(super) fn accept(&mut self) {
        self.0 |= FEATURES_OK;
    }

    /// Takes a write.
    pub(super) fn write(&mut self, new: u8) -> Step {
        if new == 0 {
            return Step::Reset;
        }
        let old = self.0;
        // The driver does not clear bits, and this one is the device's.
        let new = new | old & NEEDS_RESET;
        if old & !new != 0 {
            return Step::Broken("the driver took back a step of its start");
        }
        let come = new & !old;
        if come & !(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED) != 0 {
            return Step::Broken("the driver set a status that only a device sets");
        }
        let has = |bits: u8| new & bits == bits;
        if come & DRIVER != 0 && !has(ACKNOWLEDGE)
            || come & FEATURES_OK != 0 && !has(ACKNOWLEDGE | DRIVER)
            || come & DRIVER_OK != 0 && old & FEATURES_OK == 0
        {
            return Step::Broken("the driver left out a step of its start");
        }
        // Not noted until the features were looked at.
        self.0 = new & !(come & FEATURES_OK);
        if come & FEATURES_OK != 0 {
            Step::Choose
        } else if come & DRIVER_OK != 0 && new & NEEDS_RESET == 0 {
            Step::Start
        } else {
            Step::Note
        }
    }
}

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;
const FAILED: u8 = 128;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_driver_starts_step_by_step() {
        let mut status = Status::default();
        assert_eq!([status.write(1), status.write(3)], [Step::Note, Step::Note]);
        assert_eq!(status.write(0xb), Step::Choose);
        assert_eq!(status.byte(), 3);
        status.accept();
        assert!(status.sets_up());
        assert_eq!(status.write(0xf), Step::Start);
        assert!(status.runs());
    }

    #[test]
    fn steps_cannot_be_left_out_or_taken_back() {
        for (before, write) in
            [(&[][..], 2), (&[1], 9), (&[1, 3], 7), (&[1, 3], 1), (&[1], 0x41), (&[1], 0x11)]
        {
            let mut status = Status::default();
            before.iter().for_each(|step| {
                status.write(*step);
            });
            assert!(matches!(status.write(write), Step::Broken(_)), "{before:?} then {write:#x}");
        }
    }

    proptest! {
        /// Whatever is written, a device runs only after its features were accepted, and never while it is broken.
        #[test]
        fn no_sequence_starts_a_device_that_has_no_features(writes in prop::collection::vec(any::<u8>(), 0..40)) {
            let mut status = Status::default();
            for write in writes {
                match status.write(write) {
                    Step::Reset => status = Status::default(),
                    Step::Broken(_) => status.fail(),
                    Step::Choose => prop_assert!(status.byte() & FEATURES_OK == 0),
                    Step::Note | Step::Start => {}
                }
                prop_assert!(!status.runs());
            }
        }
    }
}
