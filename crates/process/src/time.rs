//! Times and durations as text. Times are in UTC, by RFC 3339. A time outside the years 1970 to 9999, which that form
//! cannot express, is shown as `@SECONDS` since 1970.

use std::fmt::Display;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Seconds from 1970 to the year 10000.
const END: u64 = 253_402_300_800;

/// The precision of a time as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// `2026-01-31T12:00:00Z`, `@-1`
    Seconds,
    /// `2026-01-31T12:00:00.123Z`, `@-1.123`
    Millis,
}

/// Milliseconds from 1970 to this time; negative before 1970.
pub fn millis(time: SystemTime) -> i128 {
    let signed = |passed: Duration| passed.as_millis() as i128;
    match time.duration_since(UNIX_EPOCH) {
        Ok(passed) => signed(passed),
        Err(error) => -signed(error.duration()),
    }
}

/// Milliseconds from 1970 to now; 0 if the clock is before 1970.
pub fn now_millis() -> u64 {
    u64::try_from(millis(SystemTime::now())).unwrap_or_default()
}

/// The time `millis` milliseconds after 1970, as text.
pub fn format(millis: i128, precision: Precision) -> String {
    let since_1970 = u64::try_from(millis).ok().filter(|millis| *millis < END * 1000);
    if let Some(millis) = since_1970 {
        let time = UNIX_EPOCH + Duration::from_millis(millis);
        return match precision {
            Precision::Seconds => humantime::format_rfc3339_seconds(time).to_string(),
            Precision::Millis => humantime::format_rfc3339_millis(time).to_string(),
        };
    }
    let sign = if millis < 0 { "-" } else { "" };
    let (seconds, millis) = (millis.unsigned_abs() / 1000, millis.unsigned_abs() % 1000);
    match precision {
        Precision::Seconds => format!("@{sign}{seconds}"),
        Precision::Millis => format!("@{sign}{seconds}.{millis:03}"),
    }
}

/// A duration without fractions of a second: `1m 30s`.
pub fn whole_seconds(duration: Duration) -> impl Display {
    humantime::format_duration(Duration::from_secs(duration.as_secs()))
}

/// Parses a duration, which must not be zero.
///
/// # Errors
///
/// The fault of the text, with an example of a duration.
pub fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        Ok(_) => Err("must be longer than 0".into()),
        Err(error) => Err(format!("{error}; write it as 500ms, 30s or 5m")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_all_years_are_shown() {
        let last = i128::from(END) * 1000 - 1;
        for (millis, seconds, exact) in [
            (0, "1970-01-01T00:00:00Z", "1970-01-01T00:00:00.000Z"),
            (1_700_000_000_123, "2023-11-14T22:13:20Z", "2023-11-14T22:13:20.123Z"),
            (last, "9999-12-31T23:59:59Z", "9999-12-31T23:59:59.999Z"),
            (last + 1, "@253402300800", "@253402300800.000"),
            (-1001, "@-1", "@-1.001"),
            (-86_400_000, "@-86400", "@-86400.000"),
            (i128::from(u64::MAX) * 1000, "@18446744073709551615", "@18446744073709551615.000"),
            (
                i128::MAX,
                "@170141183460469231731687303715884105",
                "@170141183460469231731687303715884105.727",
            ),
            (
                i128::MIN,
                "@-170141183460469231731687303715884105",
                "@-170141183460469231731687303715884105.728",
            ),
        ] {
            assert_eq!(format(millis, Precision::Seconds), seconds);
            assert_eq!(format(millis, Precision::Millis), exact);
        }
    }

    #[test]
    fn a_clock_may_be_before_1970() {
        assert_eq!(millis(UNIX_EPOCH - Duration::from_millis(1500)), -1500);
        assert_eq!(millis(UNIX_EPOCH + Duration::from_millis(1500)), 1500);
    }

    #[test]
    fn a_duration_of_zero_is_an_error() {
        assert_eq!(duration("1500ms"), Ok(Duration::from_millis(1500)));
        assert!(duration("0s").is_err() && duration("often").is_err());
    }
}
